"""score_mod and mask_mod with JAX arrays: values, gradients and transformations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattn
from anyattn.errors import UnsupportedProblem

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


def test_unsupported_calls_are_refused_by_name() -> None:
    arrays = [jnp.asarray(x) for x in ARRAYS]
    with pytest.raises(UnsupportedProblem, match="score_mod"):
        jax.jvp(lambda q: attend(q, *arrays[1:], jnp.asarray(TABLE)), (arrays[0],), (arrays[0],))
    with pytest.raises(ValueError, match="index"):
        attend(*arrays, jnp.asarray(TABLE)[..., :3])
    with pytest.raises(TypeError, match=r"anyattn\.captured"):
        anyattn.attention(*arrays, **functions(jnp.asarray(TABLE), jnp.asarray(KINDS)))
    with pytest.raises(TypeError, match="must call functions of numpy"):
        anyattn.attention(*arrays, score_mod=lambda score, b, h, i, j: jnp.tanh(score))
