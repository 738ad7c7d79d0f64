"""Framework for NumPy arrays. bfloat16 is recognised as ml_dtypes.bfloat16 by its name, without an import."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..definition.dtypes import DTYPES, narrow, raw, widen
from ..definition.inputs import (
    CAPTURED,
    FIELDS,
    HEADS,
    NO_EXTRAS,
    SCALES,
    SCORES,
    STATE,
    TABLE,
    Appended,
    Extras,
    Gradients,
    Inputs,
    Saved,
    SecondGradients,
    Tangents,
    replace_extras,
    reshape_gradients,
)
from ..definition.kvcache import LABELS
from ..definition.options import Options, Rotation
from ..definition.problem import Array
from ..runtime import dispatch, execute
from . import scores as formulas
from .score_arguments import ATTENTION, Call, ScoreFunctions, Use, with_traced
from .score_functions import trace_numpy

logger = logging.getLogger("anyattn")

NDArray = npt.NDArray[Any]
ALIGNMENT = 64


@lru_cache(64)
def _name(dtype: np.dtype[Any]) -> str:
    """Return dtype.name from a cache, because NumPy builds the string at every access."""
    return str(dtype.name)


class NumpyAdapter:
    """Adapter for NumPy arrays: description, allocation and addresses."""

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
        return raw(array, _name(array.dtype))

    def tables_on_host(self, device: str) -> bool:
        return True


adapter = NumpyAdapter()


def attention(
    inputs: Inputs, options: Options, seed: int | None, return_lse: bool, backend: str | None, *, want_lse: bool = False
) -> tuple[NDArray, NDArray]:
    """Return (out, lse). Without seed and rng_state, the dropout state is sampled from numpy.random."""
    prepared = prepare(with_state(inputs, options, seed), seed)
    return execute.forward(adapter, prepared, options, backend, want_lse=return_lse or want_lse)


def with_state(inputs: Inputs, options: Options, seed: int | None) -> Inputs:
    """Return the inputs with a dropout state if they need one."""
    if not options.dropout_p or inputs.extras.rng_state is not None or seed is not None:
        return inputs
    # The legacy generator, so that np.random.seed reproduces the call.
    state = np.random.randint(-(2**63), 2**63 - 1, 2, dtype=np.int64)
    return inputs._replace(extras=inputs.extras._replace(rng_state=state))


def forward(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> tuple[NDArray, NDArray]:
    return execute.forward(adapter, prepare(inputs, seed), options, backend)


def backward(saved: Saved, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> Gradients:
    """Return the gradients. The gradient of a bias has the shape in which the bias was passed."""
    grads = execute.backward(adapter, _saved(saved), prepare(inputs, seed), options, backend)
    return reshape_gradients(grads, inputs.extras)


def tangent(
    out: NDArray,
    lse: NDArray,
    tangents: Tangents,
    inputs: Inputs,
    options: Options,
    seed: int | None,
    backend: str | None,
) -> tuple[NDArray, NDArray]:
    out, lse = _rows("out", out), _rows("lse", lse)
    return execute.tangent(adapter, out, lse, _tangents(tangents), prepare(inputs, seed), options, backend)


def forward_tangent(
    tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    return execute.forward_tangent(adapter, _tangents(tangents), prepare(inputs, seed), options, backend)


def second(
    saved: Saved, tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> SecondGradients:
    grads = execute.second(adapter, _saved(saved), _tangents(tangents), prepare(inputs, seed), options, backend)
    return reshape_gradients(grads, inputs.extras)


def explain(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> dispatch.Explanation:
    return execute.explain(adapter, prepare(inputs, seed), options, backend)


def warmup(inputs: Inputs, options: Options, seed: int | None, backend: str | None, *, backward: bool) -> None:
    execute.warmup(adapter, prepare(inputs, seed), options, backend, backward=backward)


def check(inputs: Inputs, options: Options, backend: str | None) -> None:
    execute.check(adapter, prepare(inputs, None), options, backend)


def append(
    arrays: Appended, rotation: Rotation, backend: str | None, *, check: Callable[[NDArray | None], None]
) -> tuple[NDArray, NDArray | None]:
    """Append to the cache in place; return q (rotated) and the keys in use per sequence (None: all)."""
    q, new_k = arrays.q, arrays.new_k
    lengths = cache_lengths(arrays.cache_seqlens, _array("q", q).shape[0] if q.ndim else 0)
    if new_k is None:
        check_no_new_keys(arrays)
        return q, lengths
    prepared = {name: None if x is None else _prepare_appended(name, x) for name, x in arrays._asdict().items()}
    written = ("k", "v") if arrays.k_scale is None and arrays.v_scale is None else ("k", "v", "k_scale", "v_scale")
    for name in written:  # in place, so a copy would be lost
        label, cache = LABELS.get(name, name), getattr(arrays, name)
        if prepared[name] is not _array(label, cache) or not cache.flags.writeable:
            raise ValueError(f"{label} must be writeable, aligned and contiguous in its last dimension.")
    prepared["cache_seqlens"] = lengths
    used = keys_in_use(lengths, new_k)
    rotated = execute.append(adapter, Appended(**prepared), rotation, backend, check=lambda: check(used))
    return rotated, used


def _prepare_appended(name: str, x: Any) -> Any:
    if name == "cache_seqlens":
        return x
    return table(name, x) if name in ("cache_batch_idx", "block_table") else _rows(LABELS.get(name, name), x)


def check_no_new_keys(arrays: Appended) -> None:
    """Raise ValueError if an argument needs new keys that were not passed."""
    if arrays.new_v is not None or arrays.rotary_cos is not None:
        raise ValueError("k must be passed together with v and rotary_cos, got None.")


def keys_in_use(lengths: npt.NDArray[np.int32] | None, new_k: Any) -> npt.NDArray[np.int32] | None:
    """Return the keys in use per sequence after an append; None if no lengths are given."""
    rows = sum(new_k.shape[1:2])  # a wrong rank is reported later
    return None if lengths is None else np.asarray(lengths + np.int32(rows), np.int32)


def cache_lengths(lengths: Any, batch: int) -> npt.NDArray[np.int32] | None:
    """Return cache_seqlens as one length per sequence; None if it is not given."""
    if lengths is None:
        return None
    if np.ndim(lengths) == 0:
        return np.full(batch, _int("cache_seqlens", lengths), np.int32)
    return table("cache_seqlens", lengths)


def attention_with_functions(
    inputs: Inputs, options: Options, functions: ScoreFunctions, seed: int | None, return_lse: bool, backend: str | None
) -> tuple[Any, Any]:
    call = with_functions(inputs, options, *functions, ATTENTION)
    return call.results(*attention(call.inputs, call.options, seed, return_lse, backend))


def with_functions(inputs: Inputs, options: Options, score_mod: Any, mask_mod: Any, use: Use) -> Call:
    return with_traced(trace_numpy(score_mod, mask_mod, inputs.q, use.captured_gradients), inputs, options, use)


def merge(out_a: NDArray, lse_a: NDArray, out_b: NDArray, lse_b: NDArray) -> tuple[NDArray, NDArray]:
    """Merge two results; see explicit.merge."""
    top = np.maximum(lse_a, lse_b)
    safe = np.where(np.isfinite(top), top, 0)
    total = np.exp(lse_a - safe) + np.exp(lse_b - safe)
    with np.errstate(divide="ignore"):
        lse = safe + np.log(total)
    weight = np.exp(lse_b - safe) / np.where(total > 0, total, 1)
    weight = np.swapaxes(weight, -1, -2)[..., None]
    a, b = out_a.astype(lse.dtype), out_b.astype(lse.dtype)
    return (a + weight * (b - a)).astype(out_a.dtype), lse


@np.errstate(all="ignore")  # no warnings for the caller's NaN and infinities
def scores(
    inputs: Inputs, options: Options, queries: Any, stage: formulas.Stage, lse: NDArray | None = None
) -> NDArray:
    """Return a stage of the scores. In addition to the result, memory is one tile."""
    prepared = prepare(inputs, None)
    arrays = formulas.named(prepared)
    described = {name: adapter.describe(x) for name, x in arrays.items()}
    sizes = formulas.check(described, options, None if lse is None else adapter.describe(_array("lse", lse)))
    execute.check_values(adapter, prepared, options)
    arrays |= {"lse": lse, "i": np.arange(sizes.seqlen_q), "j": np.arange(sizes.seqlen_k)}
    chosen = _queries(queries, sizes.seqlen_q)
    shape = (sizes.batch, sizes.nheads, len(arrays["i"][chosen]), sizes.seqlen_k)
    name, out = _name(prepared.q.dtype), np.empty(shape, prepared.q.dtype)
    kind = DTYPES[name].compute
    functions = formulas.Functions(np.exp, np.tanh, np.where, _listed, lambda x: widen(x, _name(x.dtype), kind))
    for rows, keys in formulas.tiles(shape):
        part = formulas.part(chosen, rows, sizes.seqlen_q)
        tile = formulas.tile(functions, sizes, arrays, part, keys, stage)
        raw(out, name)[:, :, rows, keys] = narrow(tile, name)
    return out


def _listed(slots: NDArray, width: int, nheads: int) -> NDArray:
    found = np.zeros((*slots.shape[:-1], width + 1), np.bool_)  # the last column collects slots outside the tile
    np.put_along_axis(found, slots, True, -1)
    found = found[..., :-1]
    return found if found.shape[1] == 1 else np.repeat(found, nheads // found.shape[1], 1)


def _queries(queries: Any, seqlen_q: int) -> Any:
    """Return a slice or an index array."""
    if queries is None:
        return slice(None)
    if isinstance(queries, slice):
        formulas.check_slice(queries)
        return queries
    indices = np.asarray(queries)
    formulas.check_queries(indices.shape, indices.dtype.name, integers=indices.dtype.kind in "iu")
    if indices.size:
        formulas.check_range(int(indices.min()), int(indices.max()), seqlen_q)
    return indices.astype(np.int64)


def prepare(inputs: Inputs, seed: int | None) -> Inputs:
    """Return the arrays as `execute` needs them; views if possible."""
    q, k, v = _rows("q", inputs.q), _rows("k", inputs.k), _rows("v", inputs.v)
    extras = inputs.extras
    if extras is NO_EXTRAS and seed is None:
        return Inputs(q, k, v)
    if seed is not None and extras.rng_state is not None:
        raise ValueError("seed cannot be combined with rng_state, which is (seed, offset).")
    extras = Extras(
        *[None if x is None else fit(name, x, inputs) for (name, fit), x in zip(_FITS, extras, strict=True)]
    )
    if seed is not None:
        extras = replace_extras(extras, rng_state=np.array([_wrap(seed), 0], np.int64))
    return Inputs(q, k, v, extras)


def _prepare_scores(name: str, x: Any, inputs: Inputs) -> NDArray:
    array = _array(name, x)
    return _rows(name, array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim < 4 else array)


def _prepare_heads(name: str, x: Any, inputs: Inputs) -> NDArray:
    array = _array(name, x)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be floating point, got {array.dtype.name}.")
    dtype = DTYPES.get(_name(inputs.q.dtype))
    return _contiguous(array).astype(dtype.compute if dtype and dtype.compute else "float32", copy=False)


def _prepare_table(name: str, x: Any, inputs: Inputs) -> NDArray:
    if FIELDS[name].scalar and np.ndim(x) == 0:
        boundaries = inputs.extras.cu_seqlens_q
        x = np.full(len(inputs.q) if boundaries is None else len(boundaries) - 1, _int(name, x), np.int32)
    return table(name, x)


def _prepare_state(name: str, x: Any, inputs: Inputs) -> NDArray:
    return _contiguous(_array(name, x))


def _prepare_scales(name: str, x: Any, inputs: Inputs) -> NDArray:
    """Return float32 from an array or a number."""
    array = _array(name, np.asarray(x, np.float32) if isinstance(x, (int, float, np.floating)) else x)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} must be floating point, got {array.dtype.name}.")
    return _rows(name, array.astype(np.float32, copy=False))


_PREPARE = {SCORES: _prepare_scores, HEADS: _prepare_heads, TABLE: _prepare_table, SCALES: _prepare_scales}
_PREPARE |= {STATE: _prepare_state, CAPTURED: _prepare_state}
_FITS = tuple((name, _PREPARE[field.kind]) for name, field in FIELDS.items())  # in the order of Extras


def _saved(saved: Saved) -> Saved:
    return Saved(*[None if x is None and name == "dlse" else _rows(name, x) for name, x in saved._asdict().items()])


def _tangents(tangents: Tangents) -> Tangents:
    """Return the tangents as their inputs are prepared."""
    given = {name: x for name, x in tangents._asdict().items() if x is not None}
    for name, x in given.items():
        array = _array(name, x)
        if name == "tbias" and array.ndim < 4:
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        given[name] = _rows(name, array)
    return Tangents(**given)


def _array(name: str, array: Any) -> NDArray:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array like q, got {type(array).__name__}. Use one framework.")
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array, because its mask has no effect. Pass its data and mask=.")
    if not array.dtype.isnative:
        raise TypeError(f"{name} must have the machine's byte order, got {array.dtype.byteorder!r}.")
    return array


def _rows(name: str, given: Any) -> NDArray:
    """Return the array, or a copy if its last dimension is not contiguous (size 1 and broadcast count as contiguous).

    An array with unaligned elements, for example from a packed record or a file, is copied too.
    """
    array = _array(name, given)
    size = array.itemsize
    last = array.strides[-1] if array.ndim else size
    broadcast = name in ("bias", "mask", "tbias") and last == 0
    if (
        (last == size or array.shape[-1:] == (1,) or broadcast)
        and array.flags.aligned
        and all(stride % size == 0 for stride in array.strides)
    ):
        return array
    logger.debug("%s is copied: its last dimension is not contiguous, or its elements are not aligned", name)
    return _contiguous(array)


def _contiguous(array: NDArray) -> NDArray:
    """Return the array, or a contiguous and aligned copy."""
    found = np.ascontiguousarray(array)
    return found if found.flags.aligned else found.copy()


def table(name: str, given: Any) -> npt.NDArray[np.int32]:
    """Return a contiguous int32 array. Other integer dtypes and sequences of ints are converted."""
    array = np.asarray(given)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must hold integers, got {array.dtype.name}.")
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"{name} must fit in int32, got {array.min()} to {array.max()}.")
    return _contiguous(array.astype(np.int32, copy=False))


def _index(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None


def _int(name: str, value: Any) -> int:
    number = _index(name, value)
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name} must fit in int32, got {number}.")
    return number


def _wrap(seed: int) -> int:
    """Return a 64-bit seed as int64."""
    number = _index("seed", seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be a 64-bit integer, got {number}.")
    return (number + 2**63) % 2**64 - 2**63
