"""KV caches of JAX arrays: the results of NumPy arrays, eager and compiled, and no copy of a donated cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anyattn
from anyattn.compat.jax import attention_with_kvcache
from harness import jax_arrays
from harness.kvcache_cases import WRITTEN, AppendCase

CASES = {
    "plain": AppendCase(),
    "rotary": AppendCase(rotary_dim=16, seed=1),
    "rotary_halves": AppendCase(rotary_dim=24, interleaved=False, window=(7, None), seed=2),
    "entries": AppendCase(entries=True, leftpad=True, seed=3),
    "pages": AppendCase(page_size=7, rotary_dim=8, rows=1, new=1, group=4, seed=4),
    "queries_in_use": AppendCase(rows_used=True, causal=False, rotary_dim=4, seed=5),
    "float64": AppendCase(dtype="float64", rotary_dim=8, seed=6),
    "bfloat16": AppendCase(dtype="bfloat16", page_size=16, seed=7),
    "float16": AppendCase(dtype="float16", rotary_dim=8, seed=8),
    "int8": AppendCase(stored="int8", rotary_dim=8, leftpad=True, seed=9),
    "e4m3": AppendCase(stored="float8_e4m3fn", dtype="bfloat16", page_size=7, rotary_dim=8, seed=10),
    "e5m2": AppendCase(stored="float8_e5m2", entries=True, seed=11),
}


def arrays_of(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    # copies: `asarray` may share memory with NumPy, whose call appends in place
    arrays = {name: jnp.array(x) for name, x in given.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in given.items() if name not in arrays}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("backend", [None, "numpy"])
@pytest.mark.parametrize("name", CASES)
def test_append_equals_numpy_arrays(name: str, backend: str | None, jit: bool) -> None:
    given = CASES[name].draw()
    with jax_arrays.wide(CASES[name].dtype):
        arrays, others = arrays_of(given)

        def step(arrays: dict[str, Any]) -> Any:
            return attention_with_kvcache(**arrays, **others, return_lse=True, backend=backend)

        out, lse, *caches = (jax.jit(step) if jit else step)(arrays)
        wanted = anyattn.attention_with_kvcache(**given, return_lse=True, backend=backend or "cpu")
        written = [given[name] for name in WRITTEN if name in given]
        for got, want in zip((out, lse, *caches), (*wanted, *written), strict=True):
            assert np.asarray(got).tobytes() == want.tobytes()
        assert np.array_equal(arrays["k_cache"], CASES[name].draw()["k_cache"]), "the old cache is unchanged"


@pytest.mark.parametrize("scales", ["one", "heads", "sequences", "slots"])
def test_vmap_of_quantised_keys_equals_a_loop(scales: str) -> None:
    """Every array but the scales of v differs between samples."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((3, 2, 5, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.integers(-127, 128, (3, 2, 7, 2, 8)), jnp.int8) for _ in range(2))
    shape = {"one": (), "heads": (2,), "sequences": (2, 2), "slots": (2, 7, 2)}[scales]
    k_scale, v_scale = (jnp.asarray(rng.uniform(0, 0.02, (3, *shape)), jnp.float32) for _ in range(2))

    def call(q: Any, k: Any, v: Any, k_scale: Any) -> Any:
        return anyattn.attention(q, k, v, k_scale=k_scale, v_scale=v_scale[0], causal=True)

    got = jax.vmap(call)(q, k, v, k_scale)
    want = jnp.stack([call(q[n], k[n], v[n], k_scale[n]) for n in range(3)])
    np.testing.assert_array_equal(got, want)
    shared = jax.vmap(call, in_axes=(0, None, None, None))(q, k[0], v[0], k_scale[0])
    np.testing.assert_array_equal(shared[0], want[0])


def test_donated_caches_are_updated_in_place() -> None:
    cache_k, cache_v = jnp.zeros((2, 64, 2, 8)), jnp.zeros((2, 64, 2, 8))
    places = [cache.unsafe_buffer_pointer() for cache in (cache_k, cache_v)]
    x = jnp.ones((2, 1, 2, 8))

    def step(cache_k: Any, cache_v: Any, length: Any) -> Any:
        return attention_with_kvcache(x, cache_k, cache_v, k=x, v=x, cache_seqlens=length, causal=True)

    compiled = jax.jit(step, donate_argnums=(0, 1))
    for length in range(3):
        out, cache_k, cache_v = compiled(cache_k, cache_v, length)
        assert [cache.unsafe_buffer_pointer() for cache in (cache_k, cache_v)] == places
        assert (out == 1).all() and (cache_k[:, : length + 1] == 1).all() and not cache_k[:, length + 1 :].any()
    assert compiled._cache_size() == 1, "the length is an argument, not a constant"


def test_decoding_in_a_loop_equals_attention_to_the_whole_sequence() -> None:
    q, k, v = (jnp.asarray(np.random.default_rng(n).standard_normal((1, 9, 2, 8)), jnp.float32) for n in range(3))

    @jax.jit
    def decode(q: Any, k: Any, v: Any) -> Any:
        def step(caches: Any, t: Any) -> Any:
            new = (jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in (q, k, v))
            row, new_k, new_v = new
            out, *caches = attention_with_kvcache(row, *caches, k=new_k, v=new_v, cache_seqlens=t, causal=True)
            return tuple(caches), out[:, 0]

        empty = (jnp.zeros((1, 16, 2, 8)), jnp.zeros((1, 16, 2, 8)))
        return jnp.moveaxis(jax.lax.scan(step, empty, jnp.arange(9))[1], 0, 1)

    np.testing.assert_allclose(decode(q, k, v), anyattn.attention(q, k, v, causal=True), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("stored", ["", "int8"])
def test_vmap_of_an_append_equals_a_loop(stored: str, rotary: bool) -> None:
    given = [AppendCase(seed=seed, rotary_dim=8 * rotary, stored=stored).draw() for seed in range(3)]
    names = [name for name, x in given[0].items() if isinstance(x, np.ndarray) and not name.startswith("rotary")]
    others = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given[0].items()}
    stacked = {name: jnp.stack([one[name] for one in given]) for name in names}

    def call(arrays: dict[str, Any]) -> Any:
        return attention_with_kvcache(**(others | arrays))

    got = jax.vmap(call)(stacked)
    parts = [call({name: stacked[name][n] for name in names}) for n in range(3)]
    jax.tree.map(lambda x, *each: np.testing.assert_array_equal(x, np.stack(each)), got, *parts)


def test_appends_that_do_not_fit_are_refused() -> None:
    cache, x = jnp.zeros((1, 4, 2, 8)), jnp.ones((1, 1, 2, 8))
    with pytest.raises(ValueError, match="from 0 to 4"):
        attention_with_kvcache(x, cache, cache, k=x, v=x, cache_seqlens=4)
    step = jax.jit(lambda n: attention_with_kvcache(x, cache, cache, k=x, v=x, cache_seqlens=n))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"cache_seqlens\[0\]"):
        jax.block_until_ready(step(4))
    with pytest.raises(ValueError, match=r"k must be an array, got None"):
        attention_with_kvcache(x, cache, cache, cache_seqlens=3)
    with pytest.raises(NotImplementedError, match="the KV cache must not be differentiated"):
        jax.grad(lambda x: attention_with_kvcache(x, cache, cache, k=x, v=x, cache_seqlens=0)[0].sum())(x)


def test_a_call_that_would_append_in_place_names_the_function_that_returns_caches() -> None:
    cache, x = jnp.zeros((1, 4, 2, 8)), jnp.ones((1, 1, 2, 8))
    with pytest.raises(TypeError, match=r"Call anyattn\.compat\.jax\.attention_with_kvcache"):
        anyattn.attention_with_kvcache(x, cache, cache, k=x, v=x, cache_seqlens=0)
    got = anyattn.attention_with_kvcache(x, cache, cache, cache_seqlens=2)
    assert got.shape == x.shape
