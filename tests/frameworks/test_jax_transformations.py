"""Transformations of JAX around attention: gradients, vmap, loops, derivatives of second order, several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anyattn
from anyattn.frameworks.jax import primitives
from harness import jax_arrays

BATCH, ROWS, KEYS, NHEADS, NHEADS_KV, DIM, DIM_V = 2, 5, 7, 4, 2, 8, 6
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax_arrays.wide():
        yield


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def qkv(batch: int = BATCH) -> tuple[jax.Array, ...]:
    shapes = ((batch, ROWS, NHEADS, DIM), (batch, KEYS, NHEADS_KV, DIM), (batch, KEYS, NHEADS_KV, DIM_V))
    return tuple(normal(*shape, seed=seed) for seed, shape in enumerate(shapes))


def plain(q: Any, k: Any, v: Any, bias: Any = 0.0, sink: Any = None, mask: Any = True) -> Any:
    """Return (out, lse) by operations of JAX."""
    k, v = (jnp.repeat(x, NHEADS // NHEADS_KV, axis=2) for x in (k, v))
    s = jnp.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5 + bias
    s = jnp.where(mask, s, -jnp.inf)
    if sink is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))], -1)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.exp(s - lse[..., None])[..., : k.shape[1]]
    return jnp.einsum("bhij,bjhd->bihd", p, v), lse


def ours(q: Any, k: Any, v: Any, bias: Any = None, sink: Any = None, mask: Any = None) -> Any:
    return anyattn.attention(q, k, v, bias=bias, sink=sink, mask=mask, return_lse=True)


def loss(function: Function) -> Function:
    """Return a function of both results whose gradient depends on all inputs."""

    def total(*arrays: Any) -> Any:
        out, lse = function(*arrays)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    return total


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, want)


def arguments(which: str) -> tuple[jax.Array, ...]:
    extras = {
        "plain": (),
        "bias": (normal(1, NHEADS, ROWS, KEYS, seed=5),),
        "rank2": (normal(ROWS, KEYS, seed=5),),
        "sink": (normal(BATCH, NHEADS, ROWS, KEYS, seed=5), normal(NHEADS, seed=6)),
    }
    return (*qkv(), *extras[which])


KINDS = ("plain", "bias", "rank2", "sink")


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_gradients_equal_a_plain_implementation(which: str, jit: bool) -> None:
    arrays = arguments(which)
    every = tuple(range(len(arrays)))
    gradient = jax.value_and_grad(loss(ours), every)
    close((jax.jit(gradient) if jit else gradient)(*arrays), jax.value_and_grad(loss(plain), every)(*arrays))


def test_gradient_of_one_input() -> None:
    arrays = arguments("sink")
    for index in range(len(arrays)):
        close(jax.grad(loss(ours), index)(*arrays), jax.grad(loss(plain), index)(*arrays))


@pytest.mark.parametrize("which", KINDS)
def test_forward_mode_equals_a_plain_implementation(which: str) -> None:
    arrays = arguments(which)
    along = tuple(normal(*x.shape, seed=9 + i) for i, x in enumerate(arrays))
    close(jax.jvp(ours, arrays, along), jax.jvp(plain, arrays, along))
    close(jax.jit(jax.jacfwd(loss(ours)))(*arrays), jax.grad(loss(plain))(*arrays))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that are computed."""
    found: list[str] = []
    for primitive in primitives.PRIMITIVES.values():
        monkeypatch.setattr(primitive, "impl", _recorded(primitive.impl, found))
    return found


def _recorded(evaluate: Function, found: list[str]) -> Function:
    def call(*arrays: Any, static: Any) -> Any:
        found.append(static.pass_)
        return evaluate(*arrays, static=static)

    return call


def test_known_values_and_tangents_are_one_call(calls: list[str]) -> None:
    arrays = qkv()
    close(jax.jvp(ours, arrays, arrays), jax.jvp(plain, arrays, arrays))
    assert calls == ["forward_tangent"]


def test_linearized_functions_and_gradients_keep_the_forward_pass(calls: list[str]) -> None:
    arrays = qkv()
    _, tangent = jax.linearize(ours, *arrays)
    assert calls == ["forward"]
    close(tangent(*arrays), jax.jvp(plain, arrays, arrays)[1])
    calls.clear()
    jax.grad(loss(ours))(*arrays)
    assert calls == ["forward", "backward"]
    calls.clear()
    jax.vmap(lambda x: jax.jvp(lambda v: ours(*arrays[:2], v), arrays[2:], (x,)))(jnp.stack([arrays[2]] * 2))
    assert calls == ["forward", "tangent"]


@pytest.mark.parametrize("which", KINDS)
def test_second_derivatives_equal_a_plain_implementation(which: str) -> None:
    arrays = arguments(which)
    every = tuple(range(len(arrays)))
    along = tuple(normal(*x.shape, seed=9 + i) for i, x in enumerate(arrays))

    def products(function: Function) -> Any:
        gradient = jax.grad(loss(function), every)
        return jax.jvp(gradient, arrays, along), jax.vjp(gradient, *arrays)[1](along)

    close(products(ours), products(plain))


@pytest.mark.parametrize("which", KINDS)
def test_gradients_of_tangents_equal_a_plain_implementation(which: str) -> None:
    arrays = arguments(which)
    along = tuple(normal(*x.shape, seed=9 + i) for i, x in enumerate(arrays))

    def gradients(function: Function) -> Any:
        def tangents(arrays: Any, along: Any) -> Any:
            out, lse = jax.jvp(function, arrays, along)[1]
            return jnp.sin(out).sum() + jnp.cos(lse).sum()

        return jax.jit(jax.grad(tangents, (0, 1)))(arrays, along)

    close(gradients(ours), gradients(plain))


def test_vmap_of_gradients_of_tangents_equals_a_loop() -> None:
    q, k, v = (jnp.stack([x, 2 * x]) for x in qkv())

    def gradient(q: Any, k: Any, v: Any) -> Any:
        return jax.grad(lambda q: jnp.sin(jax.jvp(ours, (q, k, v), (q, k, v))[1][0]).sum())(q)

    want = jnp.stack([gradient(*arrays) for arrays in zip(q, k, v, strict=True)])
    close(jax.vmap(gradient)(q, k, v), want)
    total = jax.grad(lambda q: jax.vmap(lambda *xs: jnp.sin(jax.jvp(ours, xs, xs)[1][0]).sum())(q, k, v).sum())
    each = jax.grad(lambda q: sum(jnp.sin(jax.jvp(ours, x, x)[1][0]).sum() for x in zip(q, k, v, strict=True)))
    close(total(q), each(q))


def test_derivatives_of_third_order_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"Compute Hessians as jax\.jacfwd\(jax\.jacrev\(f\)\)"):
        jax.jacfwd(jax.jacfwd(lambda q: loss(ours)(q, k, v)))(q)
    with pytest.raises(NotImplementedError, match="attention has no third derivative"):
        jax.jit(jax.jacfwd(jax.jacfwd(lambda q: loss(ours)(q, k, v))))(q)
    second = jax.grad(lambda q: jax.grad(loss(ours))(q, k, v).sum())
    with pytest.raises(NotImplementedError, match="attention has no third derivative"):
        jax.grad(lambda q: second(q).sum())(q)


def test_arrays_without_a_derivative_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"alibi_slopes must not be differentiated.*stop_gradient\(alibi_slopes\)"):
        jax.grad(lambda slopes: anyattn.attention(q, k, v, alibi_slopes=slopes).sum())(normal(NHEADS))


def test_checkpoint_and_scan_keep_values_and_gradients() -> None:
    q, k, _ = qkv()

    def layers(function: Function, wrap: Function) -> Function:
        def layer(x: Any, _: Any) -> Any:
            return function(x, k, k)[0], None

        return lambda q: jnp.sin(jax.lax.scan(wrap(layer), q, None, length=3)[0]).sum()

    want = jax.value_and_grad(layers(plain, lambda f: f))(q)
    close(jax.jit(jax.value_and_grad(layers(ours, jax.checkpoint)))(q), want)
    close(jax.value_and_grad(layers(ours, lambda f: f))(q), want)


VMAPS = {
    "q": ((0, None, None), {}),
    "all": ((1, 0, 2), {}),
    "bias": ((0, None, None), {"bias": 0}),
    "shared_bias": ((0, 0, 0), {"bias": None}),
    "sink": ((None, None, None), {"sink": 1}),
    "shared_sink": ((0, None, 0), {"sink": None}),
    "mask": ((0, None, None), {"mask": 3}),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap_equals_a_loop(name: str) -> None:
    samples, (axes, more) = 3, VMAPS[name]
    shapes = {"bias": (1, NHEADS, ROWS, KEYS), "sink": (NHEADS,), "mask": (BATCH, 1, 1, KEYS)}
    given = dict(zip("qkv", zip([x.shape for x in qkv()], axes, strict=True), strict=True))
    given |= {name: (shapes[name], axis) for name, axis in more.items()}
    arrays = []
    for seed, (shape, axis) in enumerate(given.values()):
        full = shape if axis is None else (*shape[:axis], samples, *shape[axis:])
        arrays.append(normal(*full, seed=seed))
    if "mask" in given:
        arrays[-1] = arrays[-1] > -1
    dims = [axis for _, axis in given.values()]
    wanted = tuple(i for i, name in enumerate(given) if name != "mask")

    def call(*xs: Any) -> Any:
        return ours(**dict(zip(given, xs, strict=True)))

    def sample(n: int) -> list[Any]:
        return [x if axis is None else jnp.take(x, n, axis) for x, axis in zip(arrays, dims, strict=True)]

    for function in (call, jax.grad(loss(call), wanted)):
        got = jax.jit(jax.vmap(function, dims))(*arrays)
        parts = [function(*sample(n)) for n in range(samples)]
        close(got, jax.tree.map(lambda *xs: jnp.stack(xs), *parts))
    total = jax.grad(lambda *xs: jax.vmap(loss(call), dims)(*xs).sum(), wanted)(*arrays)
    each = jax.grad(lambda *xs: sum(loss(call)(*_sample(xs, dims, n)) for n in range(samples)), wanted)(*arrays)
    close(total, each)


def _sample(arrays: Any, dims: Any, n: int) -> list[Any]:
    return [x if axis is None else jnp.take(x, n, axis) for x, axis in zip(arrays, dims, strict=True)]


def test_vmap_folds_samples_into_one_call() -> None:
    q, k, v = (jnp.stack([x] * 3) for x in qkv())
    program = str(jax.make_jaxpr(jax.vmap(ours))(q, k, v))
    assert program.count("anyattn_forward") == 1 and "scan" not in program


def test_vmap_of_lengths_and_packed_sequences() -> None:
    q, k, v = qkv()
    lengths = jnp.asarray([[7, 3], [0, 5], [1, 2]])
    got = jax.vmap(lambda n: anyattn.attention(q, k, v, seqused_k=n))(lengths)
    close(got, jnp.stack([anyattn.attention(q, k, v, seqused_k=n) for n in lengths]))
    bounds, x = jnp.asarray([[0, 2, 5], [0, 5, 5]]), q[0]
    got = jax.vmap(lambda n: anyattn.attention_varlen(x, x, x, n, n))(bounds)
    close(got, jnp.stack([anyattn.attention_varlen(x, x, x, n, n) for n in bounds]))


def test_hessian_equals_a_plain_implementation() -> None:
    _, k, v = (x[:1, :3] for x in qkv())
    q = normal(1, 2, NHEADS, DIM, seed=4)
    close(*(jax.hessian(lambda q, f=f: loss(f)(q, k, v))(q) for f in (ours, plain)))


def test_dropout_key_decides_what_is_dropped() -> None:
    q, k, v = qkv()
    drop = jax.jit(lambda key: anyattn.attention(q, k, v, dropout_p=0.5, rng_state=key))
    first, again, other = drop(jax.random.key(1)), drop(jax.random.key(1)), drop(jax.random.key(2))
    assert (first == again).all() and not (first == other).all()
    arrays = [np.asarray(x) for x in (q, k, v)]
    close(
        anyattn.attention(q, k, v, dropout_p=0.5, seed=-5),
        anyattn.attention(*arrays, dropout_p=0.5, seed=-5, backend="cpu"),
    )
    with pytest.raises(ValueError, match=r"rng_state must be a jax\.random\.key if dropout_p > 0, got None"):
        anyattn.attention(q, k, v, dropout_p=0.5)


def test_eight_concurrent_programs_end_with_the_right_results() -> None:
    """XLA runs them on its own threads, and all of them share the CPU engine's pool."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, 300, 4, 32)), jnp.float32) for _ in range(8)]
    step = jax.jit(jax.grad(lambda x: anyattn.attention(x, x, x, causal=True).sum() + anyattn.attention(x, x, x).sum()))
    want = [np.asarray(step(x)) for x in arrays]

    def run(index: int) -> bool:
        return all(np.array_equal(np.asarray(step(arrays[index])), want[index]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8), timeout=300))
