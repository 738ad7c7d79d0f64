"""JAX arrays and tracers: their metadata, and the conversion of a call's arguments to the form that primitives take."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...definition.dtypes import DTYPES
from ...definition.inputs import (
    CAPTURED,
    FIELDS,
    HEADS,
    NO_EXTRAS,
    SCALES,
    SCORES,
    STATE,
    TABLE,
    Extras,
    Inputs,
    replace_extras,
)
from ...definition.problem import Array, contiguous

ELSEWHERE = (
    "Use jax.nn.dot_product_attention or tokamax there, or move the arrays with "
    "jax.device_put(x, jax.devices('cpu')[0])."
)
STATE_WORDS = 4  # a dropout state (seed, offset) as uint32 words, because JAX has no int64 by default


def describe(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the metadata of an array of a call. XLA passes contiguous arrays."""
    return contiguous((2,), "int64") if name == "rng_state" else contiguous(shape, dtype.name)


def is_concrete(array: Any) -> bool:
    """Return whether the values of an array can be read now."""
    return not isinstance(array, jax.core.Tracer)


def check(name: str, array: Any) -> jax.Array:
    """Return the array; raise a TypeError if it is no JAX array on the CPU."""
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name} must be a JAX array like q, got {type(array).__name__}. Pass jnp.asarray({name}).")
    if is_concrete(array):
        for device in array.devices():
            if device.platform != "cpu":
                raise TypeError(f"{name} must be a JAX array on the CPU, got one on {device.platform}. {ELSEWHERE}")
    return array


def prepare(inputs: Inputs, seed: int | None, *, dropout: bool) -> Inputs:
    """Return the arrays as primitives take them. Conversions are JAX operations, so gradients pass through them."""
    q, k, v, extras = inputs
    q, k, v = check("q", q), check("k", k), check("v", v)
    if extras is NO_EXTRAS and seed is None and not dropout:
        return Inputs(q, k, v)
    batch = q.shape[0] if extras.cu_seqlens_q is None else len(extras.cu_seqlens_q) - 1
    found = {
        name: None if x is None else _FITS[FIELDS[name].kind](name, x, q, batch)
        for name, x in zip(Extras._fields, extras, strict=True)
    }
    prepared = Extras(**found)
    if seed is not None or dropout:
        prepared = replace_extras(prepared, rng_state=random_state(seed, prepared.rng_state))
    return Inputs(q, k, v, prepared)


def _fit_scores(name: str, x: Any, q: Any, batch: int) -> Any:
    """Return an array with four dimensions."""
    array = jnp.asarray(x) if name == "mask" and isinstance(x, np.ndarray) else check(name, x)
    return array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim < 4 else array


def _fit_heads(name: str, x: Any, q: Any, batch: int) -> Any:
    array = jnp.asarray(x) if isinstance(x, np.ndarray) else check(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype.name}.")
    dtype = DTYPES.get(q.dtype.name)
    return array.astype(dtype.compute if dtype and dtype.compute else "float32")


def _fit_table(name: str, x: Any, q: Any, batch: int) -> Any:
    return per_sequence(name, x, batch) if FIELDS[name].scalar else table(name, x)


def _fit_state(name: str, x: Any, q: Any, batch: int) -> Any:
    """Return the words of a dropout state: a jax.random key, int64 (seed, offset), or its words."""
    if isinstance(x, np.ndarray) and x.dtype == np.int64 and x.shape == (2,):
        return jnp.asarray(np.ascontiguousarray(x).view(np.uint32))
    array = check(name, x)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) and array.shape == ():
        return jax.random.bits(array, (STATE_WORDS,), jnp.uint32)
    if array.dtype == jnp.uint32 and array.shape == (STATE_WORDS,):
        return array
    if array.dtype.name == "int64" and array.shape == (2,):
        return jax.lax.bitcast_convert_type(array, jnp.uint32).reshape(STATE_WORDS)
    raise TypeError(
        f"rng_state must be a jax.random.key, int64 (seed, offset) or uint32 ({STATE_WORDS},) "
        f"with its 32-bit words, got {array.dtype} of shape {array.shape}."
    )


def _fit_scales(name: str, x: Any, q: Any, batch: int) -> Any:
    """Return float32 from an array or a number."""
    if isinstance(x, (int, float, np.floating)):
        return jnp.asarray(x, jnp.float32)
    array = jnp.asarray(x) if isinstance(x, np.ndarray) else check(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype.name}.")
    return array.astype(jnp.float32)


def _fit_captured(name: str, x: Any, q: Any, batch: int) -> Any:
    return check(name, x)


_FITS = {
    SCORES: _fit_scores,
    HEADS: _fit_heads,
    TABLE: _fit_table,
    STATE: _fit_state,
    CAPTURED: _fit_captured,
    SCALES: _fit_scales,
}


def table(name: str, given: Any) -> jax.Array:
    """Return an int32 array from an array of JAX or NumPy, or from a sequence of ints."""
    if isinstance(given, jax.Array):
        array = check(name, given)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must hold integers, got {array.dtype.name}.")
        if array.dtype == jnp.int32 or not is_concrete(array):
            return array.astype(jnp.int32)
    values = np.asarray(given)
    if values.dtype.kind not in "iu" and values.size:
        raise TypeError(f"{name} must hold integers, got {values.dtype.name}.")
    return integers(name, values)


def integers(name: str, given: Any) -> jax.Array:
    """Return integers or booleans as an int32 array. Values that are known are checked."""
    if isinstance(given, jax.Array) and (given.dtype == jnp.int32 or not is_concrete(given)):
        return given.astype(jnp.int32)
    values = np.asarray(given)
    if values.dtype.kind != "b" and values.size and (values.min() < -(2**31) or values.max() >= 2**31):
        raise ValueError(f"{name} must fit in int32, got {values.min()} to {values.max()}.")
    return jnp.asarray(values.astype(np.int32))


def per_sequence(name: str, given: Any, batch: int) -> jax.Array:
    """Return an int32 table from a table, or from one integer for every sequence."""
    found = table(name, given)
    return jnp.broadcast_to(found, (batch,)) if found.ndim == 0 else found


def random_state(seed: int | None, rng_state: Any) -> Any:
    """Return the words of a dropout state.

    Raises:
        ValueError: neither or both are given. JAX has no global random generator.
    """
    if seed is None:
        if rng_state is None:
            raise ValueError("rng_state must be a jax.random.key if dropout_p > 0, got None. Or pass an int seed.")
        return rng_state
    if rng_state is not None:
        raise ValueError("seed cannot be combined with rng_state, which is (seed, offset).")
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {seed!r}. Pass a key as rng_state.") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be a 64-bit integer, got {number}.")
    number %= 2**64
    return jnp.asarray(np.array([number % 2**32, number >> 32, 0, 0], np.uint32))
