"""NumPy arrays in and out. bfloat16 is ml_dtypes.bfloat16, known by its name; nothing is imported for it."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..definition.kvcache import LABELS
from ..definition.problem import INPUTS, TABLES, Array, Options
from ..runtime import dispatch, execute

logger = logging.getLogger("anyattn")

NDArray = npt.NDArray[Any]
ALIGNMENT = 64


@lru_cache(64)
def _name(dtype: np.dtype[Any]) -> str:
    """dtype.name, which NumPy puts together anew each time."""
    return str(dtype.name)


class NumpyAdapter:
    """How NumPy arrays are described, allocated and reached."""

    name = "numpy"

    def describe(self, array: NDArray) -> Array:
        return Array(array.shape, tuple(stride // array.itemsize for stride in array.strides), _name(array.dtype))

    def keys(self, arrays: Sequence[Any]) -> Hashable:
        return tuple([None if x is None else (x.shape, x.strides, x.dtype) for x in arrays])

    def empty(self, shape: Sequence[int], dtype: str, like: NDArray) -> NDArray:
        if dtype == "uint8":  # workspace: aligned for vector loads
            raw = np.empty(shape[0] + ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            return raw[start : start + shape[0]]
        return np.empty(shape, like.dtype if dtype == _name(like.dtype) else dtype)

    def pointer(self, array: NDArray) -> int:
        return array.ctypes.data

    def numpy(self, array: NDArray) -> NDArray:
        return array.view(np.uint16) if _name(array.dtype) == "bfloat16" else array


adapter = NumpyAdapter()


def attention(
    arrays: execute.Arrays, options: Options, seed: int | None, return_lse: bool, backend: str | None
) -> tuple[NDArray, NDArray]:
    """(out, lse); draws the dropout state from numpy.random where none is given. lse may be None if not returned."""
    if options.dropout_p and arrays[-1] is None and seed is None:
        # the legacy generator on purpose: np.random.seed reproduces the call
        arrays = (*arrays[:-1], np.random.randint(-(2**63), 2**63 - 1, 2, dtype=np.int64))
    return execute.forward(adapter, prepare(arrays, seed), options, backend, want_lse=return_lse)


def forward(arrays: execute.Arrays, options: Options, seed: int | None, backend: str | None) -> tuple[NDArray, NDArray]:
    return execute.forward(adapter, prepare(arrays, seed), options, backend)


def backward(
    saved: execute.Arrays, arrays: execute.Arrays, options: Options, seed: int | None, backend: str | None
) -> execute.Arrays:
    """(dq, dk, dv, dbias or None, dsink or None); dbias has the shape of the bias that came."""
    prepared = prepare(arrays, seed)
    results = execute.backward(adapter, _saved(saved), prepared, options, backend)
    if arrays[3] is None:
        return results
    return (*results[:3], results[3].reshape(np.shape(arrays[3])), results[4])


def explain(arrays: execute.Arrays, options: Options, seed: int | None, backend: str | None) -> dispatch.Explanation:
    return execute.explain(adapter, prepare(arrays, seed), options, backend)


def warmup(arrays: execute.Arrays, options: Options, seed: int | None, backend: str | None, *, backward: bool) -> None:
    execute.warmup(adapter, prepare(arrays, seed), options, backend, backward=backward)


def check(arrays: execute.Arrays, options: Options, backend: str | None) -> None:
    execute.check(adapter, prepare(arrays, None), options, backend)


def append(
    arrays: dict[str, Any],
    *,
    check: Callable[[NDArray | None], None],
    interleaved: bool,
    by_row: bool,
    backend: str | None,
) -> tuple[NDArray, NDArray | None]:
    """Appends to the cache in place; returns q (rotated) and the keys in use per sequence (None: all).

    `check` is given the latter and raises if the attention would; it runs before anything is written.
    """
    q, new_k = arrays["q"], arrays["new_k"]
    lengths = cache_lengths(arrays["cache_seqlens"], _array("q", q).shape[0] if q.ndim else 0)
    if new_k is None:
        if arrays["new_v"] is not None or arrays["rotary_cos"] is not None:
            raise ValueError("v and rotary_cos need k, the new keys, as well")
        return q, lengths
    tables = (*TABLES, "cache_seqlens")
    prepared = {
        name: None if x is None else _rows(LABELS.get(name, name), x)
        for name, x in arrays.items()
        if name not in tables
    }
    for name in ("k", "v"):  # written in place: a copy would be lost
        cache = _array(LABELS[name], arrays[name])
        if prepared[name] is not cache or not cache.flags.writeable:
            raise ValueError(f"{name}_cache must be writeable, aligned and contiguous in its last dimension")
    for name in ("block_table", "cache_batch_idx"):
        prepared[name] = None if arrays[name] is None else table(name, arrays[name])
    prepared["cache_seqlens"] = lengths
    rows = sum(new_k.shape[1:2])  # of another rank, it is refused below
    used = None if lengths is None else np.asarray(lengths + np.int32(rows), np.int32)
    options = {"interleaved": interleaved, "by_row": by_row}
    return execute.append(adapter, prepared, check=lambda: check(used), **options, backend=backend), used


def cache_lengths(lengths: Any, batch: int) -> npt.NDArray[np.int32] | None:
    """cache_seqlens as one length per sequence; None where none is given."""
    if lengths is None:
        return None
    if np.ndim(lengths) == 0:
        return np.full(batch, _int("cache_seqlens", lengths), np.int32)
    return table("cache_seqlens", lengths)


def merge(out_a: NDArray, lse_a: NDArray, out_b: NDArray, lse_b: NDArray) -> tuple[NDArray, NDArray]:
    """See api.merge."""
    top = np.maximum(lse_a, lse_b)
    safe = np.where(np.isfinite(top), top, 0)
    total = np.exp(lse_a - safe) + np.exp(lse_b - safe)
    with np.errstate(divide="ignore"):
        lse = safe + np.log(total)
    weight = np.exp(lse_b - safe) / np.where(total > 0, total, 1)
    weight = np.swapaxes(weight, -1, -2)[..., None]
    a, b = out_a.astype(lse.dtype), out_b.astype(lse.dtype)
    return (a + weight * (b - a)).astype(out_a.dtype), lse


def prepare(arrays: execute.Arrays, seed: int | None) -> execute.Arrays:
    """The arrays as `execute` wants them: views wherever possible."""
    given = dict(zip(INPUTS, arrays, strict=True))
    for name in ("q", "k", "v"):
        given[name] = _rows(name, given[name])
    for name in ("bias", "mask"):
        if given[name] is not None:
            array = _array(name, given[name])
            given[name] = _rows(name, array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim < 4 else array)
    for name in ("alibi_slopes", "sink"):
        if given[name] is not None:
            given[name] = _floats(name, given[name], given["q"].dtype)
    if isinstance(given["offset"], int | np.integer):
        given["offset"] = np.full(_batch(given), _int("offset", given["offset"]), np.int32)
    for name in TABLES:
        if given[name] is not None:
            given[name] = table(name, given[name])
    if seed is not None:
        if given["rng_state"] is not None:
            raise ValueError("seed and rng_state exclude each other: rng_state is (seed, offset)")
        given["rng_state"] = np.array([_wrap(seed), 0], np.int64)
    elif given["rng_state"] is not None:
        given["rng_state"] = _whole(_array("rng_state", given["rng_state"]))
    return tuple(given.values())


def _saved(saved: execute.Arrays) -> execute.Arrays:
    names = ("out", "lse", "dout", "dlse")
    return tuple(None if x is None and name == "dlse" else _rows(name, x) for name, x in zip(names, saved, strict=True))


def _batch(given: dict[str, Any]) -> int:
    table = given["cu_seqlens_q"]
    return len(given["q"]) if table is None else len(table) - 1


def _array(name: str, array: Any) -> NDArray:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array like q; got {type(array).__name__}")
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would have no effect; accepted: its data, and mask=")
    if not array.dtype.isnative:
        raise TypeError(f"{name} has byte order {array.dtype.byteorder!r}; accepted: the machine's own")
    return array


def _rows(name: str, given: Any) -> NDArray:
    """The array, or a copy if its last dimension is not contiguous (of size 1 or broadcast counts as contiguous).

    One whose elements are not aligned, as in a packed record or a file, is copied too.
    """
    array = _array(name, given)
    size = array.itemsize
    last = array.strides[-1] if array.ndim else size
    broadcast = name in ("bias", "mask") and last == 0
    if (
        (last == size or array.shape[-1:] == (1,) or broadcast)
        and array.flags.aligned
        and all(stride % size == 0 for stride in array.strides)
    ):
        return array
    logger.debug("%s is copied: its last dimension is not contiguous, or its elements are not aligned", name)
    return _whole(array)


def _whole(array: NDArray) -> NDArray:
    """Contiguous and aligned: itself, or a copy."""
    found = np.ascontiguousarray(array)
    return found if found.flags.aligned else found.copy()


def _floats(name: str, array: Any, dtype: np.dtype[Any]) -> NDArray:
    array = _array(name, array)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be floating point; got {array.dtype.name}")
    return _whole(array).astype(np.float64 if dtype == np.float64 else np.float32, copy=False)


def table(name: str, given: Any) -> npt.NDArray[np.int32]:
    """int32 and contiguous; integers of other widths and sequences of ints are converted."""
    array = np.asarray(given)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must hold integers; got {array.dtype.name}")
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"{name} must fit in int32; got {array.min()} to {array.max()}")
    return _whole(array.astype(np.int32, copy=False))


def _index(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None


def _int(name: str, value: Any) -> int:
    number = _index(name, value)
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name} must fit in int32; got {number}")
    return number


def _wrap(seed: int) -> int:
    """Any 64-bit seed as int64."""
    number = _index("seed", seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be a 64-bit integer; got {number}")
    return (number + 2**63) % 2**64 - 2**63
