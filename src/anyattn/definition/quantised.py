"""Quantised keys and values: k_j = k_scale k_stored_j, v_j = v_scale v_stored_j, and the quantisation of new ones.

A scale is for all keys (), per head (nheads_kv,), per sequence and head (batch, nheads_kv), or per slot and head, in
the shape of k without its last dimension. Packed keys have one row of slots: (1, total_k, nheads_kv).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES, FLOAT8, QUANTISED, narrow
from .problem import Array, Problem
from .sequences import Sequence, Tables, sequences

NDArray = npt.NDArray[Any]
SCALES_OF = {"k": "k_scale", "v": "v_scale"}
_SMALLEST = np.finfo(np.float32).tiny


def check_given(given: Mapping[str, Array]) -> None:
    """Raise a ValueError unless quantised k and v have scales, and others have none."""
    stored = given["k"].dtype
    for name in SCALES_OF.values():
        if stored in QUANTISED and name not in given:
            raise ValueError(f"{name} must be a number or an array for k and v of {stored}, got None.")
        if stored not in QUANTISED and name in given:
            accepted = ", ".join(QUANTISED)
            raise ValueError(f"{name} must be None for k and v of {stored}, got scales. Only {accepted} have scales.")


def check_appendable(given: Mapping[str, Array]) -> None:
    """Raise unless the scales have a place for each new key and value."""
    for name in SCALES_OF.values():
        scale = given.get(name)
        want = given["k"].shape[:-1]
        if scale is not None and (scale.shape != want or scale.dtype != "float32"):
            raise ValueError(
                f"{name} must be a float32 array (entries, slots, nheads_kv) = {want} if keys are appended, "
                f"got {scale.dtype} {scale.shape}."
            )


def sizes(k: Array) -> dict[str, int]:
    """Return the named sizes of scales with one value per slot."""
    entries, slots = (1, k.shape[0]) if len(k.shape) == 3 else k.shape[:2]
    return {"entries": entries, "slots": slots}


def check_values(problem: Problem, tables: Tables, found: Mapping[str, NDArray], *, slots: bool) -> None:
    """Raise a ValueError unless every scale is finite and >= 0. Scales per slot are checked only with `slots`.

    Slots that are not in use may hold any scale.
    """
    for name, scale in found.items():
        if scale.ndim < 3:
            _check_finite(name, scale)
        elif slots:
            for sequence in sequences(problem, tables):
                used = np.arange(sequence.leftpad, sequence.n_k)
                index = slot_index(problem, sequence, used, tables.get("block_table"))
                _check_finite(name, scales(problem, sequence, scale, index, slice(None)))


def _check_finite(name: str, scale: NDArray) -> None:
    bad = ~(np.isfinite(scale) & (scale >= 0))
    if bad.any():
        raise ValueError(f"{name} must be finite and >= 0, got {scale[bad].flat[0]}.")


def slot_index(problem: Problem, sequence: Sequence, slots: NDArray, block_table: Any) -> tuple[Any, ...]:
    """Return the index of some slots of a sequence in k and v, without heads."""
    if problem.paged:
        return (block_table[sequence.number][slots // problem.page_size], slots % problem.page_size)
    return (sequence.row_k + slots,) if problem.packed_k else (sequence.batch_k, slots)


def scales(problem: Problem, sequence: Sequence, scale: NDArray, index: Any, heads: Any) -> NDArray:
    """Return the scales of some keys of a sequence, (keys or 1, heads).

    index: of these keys in k, without heads; heads: a slice of KV heads.
    """
    if scale.ndim == 3:
        place: Any = (*index, heads)
        return np.asarray(scale[0][place] if problem.packed_k else scale[place])
    if scale.ndim == 0:
        return scale.reshape(1, 1)
    return np.asarray((scale if scale.ndim == 1 else scale[sequence.number])[heads])[None]


def quantise(x: NDArray, dtype: str) -> tuple[NDArray, NDArray]:
    """Return x (..., dim) in a stored dtype, and its scales (...) in float32.

        scale = max |x| / largest number of the dtype           stored = round(x / scale), to nearest even

    x is rounded to float32 first, and every step is one float32 operation, so that all backends give the same bits. A
    scale below the smallest normal number becomes 0, and with NaN or infinity in x it becomes NaN. float8 is returned
    as its bits.
    """
    largest = np.float32(DTYPES[dtype].largest)
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
        scale = np.abs(x).max(axis=-1, initial=0) / largest
        scale = np.where(scale < _SMALLEST, np.float32(0), scale)
        usable = np.isfinite(scale) & (scale > 0)
        ratio = x / np.where(usable, scale, np.float32(1))[..., None]
        ratio = np.where(usable[..., None], np.clip(ratio, -largest, largest), np.float32(0))
        scale = np.where(np.isfinite(scale), scale, np.float32(np.nan))
    stored = narrow(ratio, dtype) if dtype in FLOAT8 else np.rint(ratio).astype(dtype)
    return stored, scale
