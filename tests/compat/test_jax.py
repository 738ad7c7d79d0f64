"""Drop-ins for JAX's interfaces against jax.nn.dot_product_attention and against tokamax's masks."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyattn.compat.jax import dot_product_attention, tokamax_implementation
from harness import jax_arrays

B, T, S, N, K, H = 2, 6, 9, 4, 2, 8


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, H, seed=2)
ALL_KEYS = jnp.asarray([S, S])  # jax.nn 0.6 ignores a window without lengths, a mask or is_causal
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": 3, "key_value_seq_lengths": ALL_KEYS},
    "window_of_two_sides": {"local_window_size": (2, 4), "key_value_seq_lengths": ALL_KEYS},
    "causal_window": {"local_window_size": (2, 4), "is_causal": True},
    "lengths": {"query_seq_lengths": jnp.asarray([4, 6]), "key_value_seq_lengths": jnp.asarray([9, 3])},
    "bias": {"bias": normal(1, N, T, S, seed=3)},
    "bias_of_keys": {"bias": normal(B, 1, 1, S, seed=3), "is_causal": True},
    "mask": {"mask": normal(B, 1, T, S, seed=4) > -1},
    "mask_and_bias": {"mask": normal(B, N, 1, S, seed=4) > -1, "bias": normal(1, 1, T, S, seed=5)},
}


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), got, want)


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_equal_jax_nn(name: str) -> None:
    given = CALLS[name]

    def loss(function: Any) -> Any:
        return lambda *xs: jnp.sin(function(*xs, **given)).sum()

    close(dot_product_attention(QUERY, KEY, VALUE, **given), jax.nn.dot_product_attention(QUERY, KEY, VALUE, **given))
    got, want = (
        jax.jit(jax.grad(loss(f), (0, 1, 2)))(QUERY, KEY, VALUE)
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    close(got, want)


def test_arrays_without_batch_equal_jax_nn() -> None:
    arrays = [x[0] for x in (QUERY, KEY, VALUE)]
    for given in ({"is_causal": True}, {"bias": normal(1, N, T, S, seed=3)}):
        close(dot_product_attention(*arrays, **given), jax.nn.dot_product_attention(*arrays, **given))


@pytest.mark.skipif("return_residual" not in inspect.signature(jax.nn.dot_product_attention).parameters, reason="old")
@pytest.mark.parametrize("lead", [(), (0,)])
def test_residual_equals_jax_nn(lead: tuple[int, ...]) -> None:
    arrays = [x[lead] for x in (QUERY, KEY, VALUE)]
    close(
        dot_product_attention(*arrays, return_residual=True, is_causal=True),
        jax.nn.dot_product_attention(*arrays, return_residual=True, is_causal=True),
    )


def test_signature_equals_that_of_jax_nn() -> None:
    ours = inspect.signature(dot_product_attention).parameters
    for name, theirs in inspect.signature(jax.nn.dot_product_attention).parameters.items():
        assert (ours[name].kind, ours[name].default) == (theirs.kind, theirs.default), name


def test_a_query_without_keys_gives_zeros() -> None:
    lengths = jnp.asarray([0, 9])
    assert not dot_product_attention(QUERY, KEY, VALUE, key_value_seq_lengths=lengths)[0].any()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="implementation must be None or 'anyattn', got 'cudnn'"):
        dot_product_attention(QUERY, KEY, VALUE, implementation="cudnn")
    with pytest.raises(ValueError, match=r"query must be \(B, T, N, H\) or \(T, N, H\)"):
        dot_product_attention(QUERY[0, 0], KEY, VALUE)


@dataclasses.dataclass(frozen=True)
class Mask:
    """The fields and the method of tokamax's mask."""

    bool_mask: Any = None
    q_end: Any = None
    k_start: Any = None
    k_end: Any = None
    is_causal: bool = False

    def __bool__(self) -> bool:
        return self.is_causal or any(x is not None for x in (self.bool_mask, self.q_end, self.k_start, self.k_end))

    def as_array(self, rows: int, keys: int) -> Any:
        i, j = jnp.arange(rows)[:, None], jnp.arange(keys)[None]
        parts = [] if self.bool_mask is None else [self.bool_mask]
        parts += [] if self.q_end is None else [i < self.q_end[..., None, :]]
        parts += [] if self.k_start is None else [j >= self.k_start[..., None]]
        parts += [] if self.k_end is None else [j < self.k_end[..., None]]
        parts += [i >= j] if self.is_causal else []
        seen = parts[0]
        for part in parts[1:]:
            seen = seen & part
        return seen


MASKS = {
    "causal": Mask(is_causal=True),
    "lengths": Mask(k_end=jnp.asarray([9, 3])[:, None, None]),
    "causal_lengths": Mask(k_end=jnp.asarray([9, 20])[:, None, None], is_causal=True),
    "queries": Mask(q_end=jnp.asarray([4, 6])[:, None, None], k_end=jnp.asarray([9, 3])[:, None, None]),
    "window": Mask(k_start=jnp.arange(T) - 2, k_end=jnp.arange(T) + 3),
    "dense": Mask(bool_mask=normal(B, 1, T, S, seed=4) > -1, is_causal=True),
}


@pytest.mark.parametrize("name", MASKS)
def test_tokamax_masks_become_masks_of_the_call(name: str) -> None:
    mask = MASKS[name]
    seen = mask.as_array(T, S)
    seen = jnp.broadcast_to(seen.reshape((1,) * (4 - seen.ndim) + seen.shape), (B, 1, T, S))
    want = jnp.where(seen.any(-1)[:, 0, :, None, None], jax.nn.dot_product_attention(QUERY, KEY, VALUE, mask=seen), 0.0)
    close(jax.jit(lambda *xs: tokamax_implementation(*xs, mask=mask, logits_scale=None))(QUERY, KEY, VALUE), want)
    lead = [x[:, None] for x in (QUERY, KEY, VALUE)]
    if mask.k_end is None and mask.q_end is None and mask.bool_mask is None:
        close(tokamax_implementation(*lead, mask=mask), want[:, None])


def test_tokamax_arguments_are_computed_or_refused() -> None:
    want = dot_product_attention(QUERY, KEY, VALUE, scale=0.4)
    close(tokamax_implementation(QUERY, KEY, VALUE, logits_scale=0.4, q_sharding=None), want)
    bias = normal(B, N, T, S, seed=3)
    close(tokamax_implementation(QUERY, KEY, VALUE, bias=bias), dot_product_attention(QUERY, KEY, VALUE, bias=bias))
    with pytest.raises(NotImplementedError, match="logits_soft_cap must be None with a bias"):
        tokamax_implementation(QUERY, KEY, VALUE, bias=bias, logits_soft_cap=3.0)
    with pytest.raises(NotImplementedError, match="got q_sharding"):
        tokamax_implementation(QUERY, KEY, VALUE, q_sharding="x")
    with pytest.raises(NotImplementedError, match="quantised"):
        tokamax_implementation(object(), KEY, VALUE)


def test_float64_is_computed_in_float64() -> None:
    with jax_arrays.wide():
        arrays = [x.astype(jnp.float64) for x in (QUERY, KEY, VALUE)]
        q, k, v = (np.asarray(x) for x in arrays)
        s = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, N // K, axis=2)) * H**-0.5
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        want = np.einsum("bhij,bjhd->bihd", p, np.repeat(v, N // K, axis=2))
        np.testing.assert_allclose(dot_product_attention(*arrays), want, rtol=1e-12, atol=1e-14)
