"""score_mod and mask_mod with JAX arrays: values, gradients and transformations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattn
from anyattn.errors import UnsupportedProblem
from harness import jax_arrays

BATCH, N_Q, N_K = 2, 5, 7
rng = np.random.default_rng(0)
ARRAYS = [rng.standard_normal((BATCH, n, heads, 8)).astype(np.float32) for n, heads in ((N_Q, 4), (N_K, 2), (N_K, 2))]
TABLE = rng.standard_normal((BATCH, 4, N_Q + N_K)).astype(np.float32)
KINDS = np.array([0, 1, 1, 0, 1, 0, 1])


def functions(table: Any, kinds: Any) -> dict[str, Any]:
    """Return functions that read the batch entry, the head and both positions."""

    def relative(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 2 * np.tanh(score) + table[b, h, q_idx - kv_idx + N_K - 1]

    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx + 1 >= kv_idx) & (kinds[kv_idx] != h)

    return {"score_mod": relative, "mask_mod": visible}


def attend(q: Any, k: Any, v: Any, table: Any, **options: Any) -> Any:
    given = functions(anyattn.captured(table), anyattn.captured(jnp.asarray(KINDS)))
    return anyattn.attention(q, k, v, **given, **options)


def of_torch() -> tuple[np.ndarray, list[np.ndarray]]:
    """Return out and the gradients of sum(out^2) that torch tensors give."""
    leaves = [torch.from_numpy(x).requires_grad_() for x in (*ARRAYS, TABLE)]
    out = anyattn.attention(*leaves[:3], **functions(leaves[3], torch.from_numpy(KINDS)))
    (out**2).sum().backward()
    return out.detach().numpy(), [x.grad.numpy() for x in leaves]


@pytest.mark.parametrize("backend", [None, "cpu", "numpy"])
@pytest.mark.parametrize("jit", [False, True])
def test_results_and_gradients_equal_torch_tensors(jit: bool, backend: str | None) -> None:
    def loss(*arrays: Any) -> Any:
        out = attend(*arrays, backend=backend)
        return (out**2).sum(), out

    function = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    (_, out), gradients = (jax.jit(function) if jit else function)(*map(jnp.asarray, (*ARRAYS, TABLE)))
    want, wanted = of_torch()
    np.testing.assert_allclose(out, want, atol=1e-6)
    for got, gradient in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, gradient, atol=1e-5)


def test_vmap_equals_a_loop() -> None:
    """Each sample counts its own batch entries."""
    samples = [jnp.stack([jnp.asarray(x), jnp.asarray(x)[::-1] * 0.5]) for x in ARRAYS]
    table = jnp.asarray(TABLE)
    got = jax.vmap(lambda *xs: attend(*xs, table))(*samples)
    want = jnp.stack([attend(*[x[one] for x in samples], table) for one in range(2)])
    np.testing.assert_array_equal(got, want)


def whole(q: Any, k: Any, v: Any, table: Any) -> Any:
    """Return what `attend` does, from all scores in operations of JAX."""
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    b, h, i, j = jnp.ogrid[: q.shape[0], : q.shape[2], : q.shape[1], : k.shape[1]]
    s = 2 * jnp.tanh(jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5) + table[b, h, i - j + N_K - 1]
    s = jnp.where((i + 1 >= j) & (jnp.asarray(KINDS)[j] != h), s, -jnp.inf)
    live = (s > -jnp.inf).any(-1, keepdims=True)
    p = jnp.where(live, jax.nn.softmax(jnp.where(live, s, 0.0), axis=-1), 0.0)
    return jnp.einsum("bhij,bjhd->bihd", p, v)


def penalty(f: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    return sum((x**2).sum() for x in jax.grad(lambda *xs: (f(*xs, table) ** 3).sum(), argnums=(0, 1, 2))(q, k, v))


WAYS: dict[str, Any] = {
    "jvp": lambda f, xs, ts, table: jax.jvp(lambda *ys: f(*ys, table), xs, ts),
    "hessian": lambda f, xs, ts, table: jax.hessian(lambda q: (f(q, *xs[1:], table) ** 3).sum())(xs[0]),
    "grad of jvp": lambda f, xs, ts, table: jax.grad(
        lambda *ys: (jax.jvp(lambda *zs: f(*zs, table), ys, ts)[1] ** 2).sum(), argnums=(0, 1, 2)
    )(*xs),
    "grad of grad": lambda f, xs, ts, table: jax.grad(lambda *ys: penalty(f, *ys), argnums=(0, 1, 2, 3))(*xs, table),
}


@pytest.mark.parametrize(("way", "jit"), [("jvp", False), *((way, True) for way in WAYS)])
def test_derivatives_equal_operations_of_jax(way: str, jit: bool) -> None:
    with jax_arrays.wide():
        xs = tuple(jnp.asarray(x, jnp.float64) for x in ARRAYS)
        ts, table = tuple(x[::-1] for x in xs), jnp.asarray(TABLE, jnp.float64)
        of_ours, of_jax = (partial(WAYS[way], f) for f in (attend, whole))
        got = (jax.jit(of_ours) if jit else of_ours)(xs, ts, table)
        want = jax.jit(of_jax)(xs, ts, table)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * (1 + np.abs(b).max()))


def test_unsupported_calls_are_refused_by_name() -> None:
    arrays = [jnp.asarray(x) for x in ARRAYS]
    with pytest.raises(UnsupportedProblem, match="pass with a tangent of arrays that score_mod reads"):
        jax.jvp(lambda table: attend(*arrays, table), (jnp.asarray(TABLE),), (jnp.asarray(TABLE),))
    with pytest.raises(ValueError, match="index"):
        attend(*arrays, jnp.asarray(TABLE)[..., :3])
    with pytest.raises(TypeError, match=r"anyattn\.captured"):
        anyattn.attention(*arrays, **functions(jnp.asarray(TABLE), jnp.asarray(KINDS)))
    with pytest.raises(TypeError, match="must call functions of numpy"):
        anyattn.attention(*arrays, score_mod=lambda score, b, h, i, j: jnp.tanh(score))
