"""Scores and weights of selected queries, tile by tile, on the arrays of any framework.

    t_ij = scale <q_i, k_j>      t_ij = softcap tanh(t_ij / softcap)      s_ij = t_ij + bias_ij - slope_h |p - c|
    P_ij = exp(s_ij - lse_i) where query i attends to key j, else 0

The formulas are written once, with operators that every framework's arrays have. A framework supplies the few functions
that differ (`Functions`). `tile` computes one tile of a result and writes to no array, so a framework with automatic
differentiation gets gradients if one tile is the whole result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from ..definition.dtypes import DTYPES, QUANTISED
from ..definition.inputs import Extras, Inputs
from ..definition.mask import Mask
from ..definition.options import Options
from ..definition.problem import Array
from ..definition.validate import check_attention, make_interval

# scale q k^T; after softcap; with bias and ALiBi, -inf for masked keys; P.
Stage = Literal["products", "capped", "masked", "weights"]

TILE_KEYS = 1024
TILE_ENTRIES = 2**22  # entries of a tile: 16 MiB in float32


class Functions(NamedTuple):
    """Functions of a framework that are not operators. `compute` returns values in the compute dtype."""

    exp: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    where: Callable[[Any, Any, Any], Any]
    # (slots (batch, heads, queries, n), number of keys, heads) -> which keys are listed.
    listed: Callable[[Any, int, int], Any]
    compute: Callable[[Any], Any]


class Scores(NamedTuple):
    """Sizes and scalars that the scores of a call depend on."""

    batch: int
    nheads: int
    seqlen_q: int
    seqlen_k: int
    interval: Mask
    alignment: str
    scale: float
    softcap: float


class Places(NamedTuple):
    """Positions p of queries and c of keys, and the visible keys of each query before masks and biases."""

    p: Any  # (batch or 1, 1, queries, 1)
    c: Any  # (batch or 1, 1, 1, keys)
    seen: Any  # (batch or 1, 1, queries, keys)


def named(inputs: Inputs) -> dict[str, Any]:
    """Return the arrays that the scores of a call read, by name."""
    q, k, _, extras = inputs
    given = dict(zip(Extras._fields, extras, strict=True))
    return {"q": q, "k": k, **{name: x for name, x in given.items() if x is not None}}


def check(given: Mapping[str, Array], options: Options, lse: Array | None) -> Scores:
    """Check the metadata of a call and return the values that its scores depend on. torch.compile traces this function.

    Raises:
        ValueError, TypeError: an array or a scalar is wrong; the message names it.
    """
    q, k = given["q"], given["k"]
    if k.dtype in QUANTISED:
        raise TypeError(f"k must have q's dtype {q.dtype}, got {k.dtype}. Multiply it by its scales first.")
    batch, seqlen_q, seqlen_k = check_attention({**given, "v": k}, options)
    if lse is not None:
        _check_lse(lse, q)
    return Scores(
        batch=batch,
        nheads=q.shape[2],
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        interval=make_interval(options, "offset" in given, seqlen_q, seqlen_k),
        alignment=options.alignment,
        scale=1.0 / math.sqrt(q.shape[3]) if options.scale is None else float(options.scale),
        softcap=float(options.softcap),
    )


def _check_lse(lse: Array, q: Array) -> None:
    shape, dtype = (q.shape[0], q.shape[2], q.shape[1]), DTYPES[q.dtype].compute
    if tuple(lse.shape) != shape:
        raise ValueError(f"lse must have shape (batch, nheads, seqlen_q) = {shape}, got {lse.shape}. {_HINT}")
    if lse.dtype != dtype:
        raise TypeError(f"lse must have dtype {dtype} for q of {q.dtype}, got {lse.dtype}. {_HINT}")
    if lse.device != q.device:
        raise ValueError(f"lse must be on q's device {q.device}, got {lse.device}. {_HINT}")


_HINT = "Pass lse as attention(..., return_lse=True) returned it."


def check_queries(shape: tuple[int, ...], dtype: str, *, integers: bool) -> None:
    """Check the shape and the dtype of query indices."""
    if len(shape) != 1 or not (integers or shape[0] == 0):
        accepted = "None, a slice or a 1-D array, tensor or list of integers"
        raise TypeError(f"queries must be {accepted}, got {dtype} of shape {shape}. Pass [i] for one query.")


def check_slice(queries: slice) -> None:
    """Check a slice of queries."""
    if queries.step is not None and queries.step < 1:
        raise ValueError(f"queries must be a slice with a positive step, got {queries}. Pass a list of indices.")


def check_range(low: int, high: int, seqlen_q: int) -> None:
    """Check the smallest and the largest query index; negative ones count from the end."""
    if low < -seqlen_q or high >= seqlen_q:
        wrong = low if low < -seqlen_q else high
        raise ValueError(f"queries must be indices from {-seqlen_q} to {seqlen_q - 1}, got {wrong}.")


def tiles(shape: tuple[int, int, int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield the position of each tile in a result (batch, nheads, queries, keys): slices of its last two axes."""
    batch, nheads, queries, keys = shape
    width = max(1, min(keys, TILE_KEYS))
    height = max(1, TILE_ENTRIES // max(1, batch * nheads * width))
    for start in range(0, keys, width):
        for first in range(0, queries, height):
            yield slice(first, min(first + height, queries)), slice(start, min(start + width, keys))


def part(queries: Any, place: slice, seqlen_q: int) -> Any:
    """Return the queries at a slice of the result."""
    if not isinstance(queries, slice):
        return queries[place]
    start, _, step = queries.indices(seqlen_q)
    return slice(start + place.start * step, start + place.stop * step, step)


def tile(f: Functions, scores: Scores, arrays: Mapping[str, Any], queries: Any, keys: slice, stage: Stage) -> Any:
    """Return a stage of the scores, (batch, nheads, queries, keys), in the compute dtype.

    Args:
        f: functions of the framework.
        scores: from `check`.
        arrays: q, k, lse and the optional arrays by name, prepared; and the indices "i" of all queries and "j" of all
            keys, int64.
        queries: slice or index array.
        keys: slice.
        stage: what is computed.
    """
    q, k = f.compute(arrays["q"][:, queries]), f.compute(arrays["k"][:, keys])
    if stage == "products":
        return _products(scores, q, k)
    if stage == "capped":
        return _capped(f, scores, _products(scores, q, k))
    places = _places(scores, arrays, queries, keys)
    # A masked key may hold NaN, and 0 times NaN would reach gradients.
    q = f.where(places.seen.any(-1)[:, 0, :, None, None], q, 0.0)
    k = f.where(places.seen.any(-2)[:, 0, :, None, None], k, 0.0)
    s = _capped(f, scores, _products(scores, q, k))
    s, seen = _masked(f, scores, arrays, queries, keys, s, places)
    s = f.where(seen, s, -math.inf)
    if stage == "masked":
        return s
    lse = arrays["lse"][:, :, queries][..., None]
    return f.exp(s - f.where(lse == -math.inf, 0.0, lse))


def _products(scores: Scores, q: Any, k: Any) -> Any:
    """Return scale q k^T by one matrix product per KV head, for all query heads that use it."""
    batch, rows, nheads, head_dim = q.shape
    _, keys, nheads_kv, _ = k.shape
    group = nheads // nheads_kv
    q = q.reshape(batch, rows, nheads_kv, group, head_dim).swapaxes(1, 2).swapaxes(2, 3)
    t = q.reshape(batch, nheads_kv, group * rows, head_dim) @ k.swapaxes(1, 2).swapaxes(2, 3)
    return scores.scale * t.reshape(batch, nheads, rows, keys)


def _capped(f: Functions, scores: Scores, t: Any) -> Any:
    return scores.softcap * f.tanh(t / scores.softcap) if scores.softcap > 0 else t


def _places(scores: Scores, arrays: Mapping[str, Any], queries: Any, keys: slice) -> Places:
    i, j = arrays["i"][queries].reshape(1, 1, -1, 1), arrays["j"][keys].reshape(1, 1, 1, -1)
    n_q, n_k = _table(arrays, "seqused_q", scores.seqlen_q), _table(arrays, "seqused_k", scores.seqlen_k)
    leftpad = _table(arrays, "leftpad_k", 0)
    aligned = n_k - leftpad - n_q if scores.alignment == "bottom-right" else 0
    p, c = i + _table(arrays, "offset", aligned), j - leftpad
    left, right, chunk = scores.interval
    seen = (i < n_q) & (j < n_k) & (c >= 0)
    if left is not None:
        seen = seen & (c >= p - left)
    if right is not None:
        seen = seen & (c <= p + right)
    if chunk > 0:
        seen = seen & (c // chunk == p // chunk)
    return Places(p, c, seen)


def _table(arrays: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return one value per sequence, (batch, 1, 1, 1), or the default."""
    table = arrays.get(name)
    return default if table is None else table.reshape(-1, 1, 1, 1)


def _masked(
    f: Functions, scores: Scores, arrays: Mapping[str, Any], queries: Any, keys: slice, s: Any, places: Places
) -> tuple[Any, Any]:
    """Return s with bias and ALiBi added, and the visible keys of each query."""
    bias, mask, slopes = (arrays.get(name) for name in ("bias", "mask", "alibi_slopes"))
    seen = places.seen
    if bias is not None:
        s = s + f.compute(_scores_tile(bias, queries, keys))
    if slopes is not None:
        s = s - slopes.reshape(-1, scores.nheads, 1, 1) * f.compute(abs(places.p - places.c))
    if mask is not None:
        seen = seen & _scores_tile(mask, queries, keys)
    if "kv_indices" in arrays:
        seen = seen & _listed(f, arrays["kv_indices"], scores.nheads, queries, keys)
    return s, seen


def _listed(f: Functions, lists: Any, nheads: int, queries: Any, keys: slice) -> Any:
    """Return the keys of a tile that are in the list of each query, (batch, 1 or nheads, queries, keys)."""
    lists = (lists if lists.ndim == 4 else lists[:, None])[:, :, queries]
    width = keys.stop - keys.start
    inside = (lists >= keys.start) & (lists < keys.stop)
    return f.listed(f.where(inside, lists - keys.start, width), width, nheads)


def _scores_tile(x: Any, queries: Any, keys: slice) -> Any:
    """Return the tile of a bias or a mask. An axis of size 1 is broadcast."""
    x = x[:, :, queries] if x.shape[2] != 1 else x
    return x[..., keys] if x.shape[3] != 1 else x
