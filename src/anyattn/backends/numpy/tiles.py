"""Tiles of a problem: their sizes, their positions in a call's arrays, reading and writing.

A tile of queries is (heads_kv, group * rows, dim). The query heads of one KV head are stacked, so that one matrix
product computes the whole group. A tile of keys is (heads_kv, keys, dim).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition.dtypes import narrow, raw, widen
from ...definition.inputs import TABLES
from ...definition.problem import Array, Problem
from ...definition.quantised import SCALES_OF, scales
from ...definition.score.evaluate import Functions, Place
from ...definition.score.interval_rules import Interval
from ...definition.score.intervals import Extremes, Range, bounds
from ...definition.sequences import Sequence, selected_keys, sequences
from ..base import Call

Floats = npt.NDArray[Any]

TILE_Q = 256  # queries, counting all heads of a group
TILE_K = 256
TILE_MASKED = 128  # of queries and of keys with mask_mod; as the blocks of block masks, and smaller, to skip more
TILE_ENTRIES = 2**18  # scores stored at a time: 1 MB in float32


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries [start, stop) of one sequence, for the query heads of the KV heads [first, last)."""

    sequence: Sequence
    start: int
    stop: int
    first: int
    last: int
    group: int

    @property
    def heads(self) -> slice:
        return slice(self.first * self.group, self.last * self.group)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (heads_kv, group, rows)."""
        return (self.last - self.first, self.group, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Keys:
    """Key slots [start, stop). `visible` marks the visible keys; it is None if every query attends to every key.

    `visible` is (heads_kv, group, rows, keys), with size 1 along the axes of heads that have the same mask.
    """

    start: int
    stop: int
    visible: npt.NDArray[np.bool_] | None


def row_tiles(problem: Problem, sequence: Sequence) -> Iterator[Rows]:
    """Yield the tiles of queries.

    Sizes depend only on the sequence and the heads, so results do not depend on the batch.
    """
    tile = TILE_MASKED if problem.functions.mask is not None else TILE_Q
    rows = max(1, min(tile // problem.group, sequence.n_q))
    keys = max(1, min(TILE_K, sequence.n_k))
    entries = keys * max(problem.group * rows, problem.head_dim, problem.head_dim_v)
    heads_kv = max(1, TILE_ENTRIES // entries)
    for first in range(0, problem.nheads_kv, heads_kv):
        last = min(first + heads_kv, problem.nheads_kv)
        for start in range(0, sequence.n_q, rows):
            yield Rows(sequence, start, min(start + rows, sequence.n_q), first, last, problem.group)


def key_tiles(arrays: Arrays, rows: Rows) -> Iterator[Keys]:
    """Yield the tiles with at least one visible key."""
    sequence, problem = rows.sequence, arrays.problem
    lo, hi = problem.interval.bounds(sequence.positions(rows.start, rows.stop), sequence.n_k, sequence.leftpad)
    lists = arrays.selected_keys(rows)
    end = int(hi[-1])  # lo and hi never decrease
    tile = TILE_MASKED if problem.functions.mask is not None else TILE_K
    starts = np.arange(int(lo[0]), end, tile)
    stops = np.minimum(starts + tile, end)
    some, every = _masked(arrays, rows, starts, stops)
    for start, stop, some_visible, all_visible in zip(starts.tolist(), stops.tolist(), some, every, strict=True):
        if not some_visible:
            continue
        visible: Any = None
        if lists is not None or start < lo[-1] or stop > hi[0]:
            slots = np.arange(start, stop)
            visible = ((lo[:, None] <= slots) & (slots < hi[:, None]))[None, None]
        if lists is not None:
            visible = visible & _listed(lists, start, stop)
        if not all_visible:
            mask = arrays.functions.mask(place(rows, start, stop))
            visible = np.broadcast_to(
                mask if visible is None else visible & mask, _shape(mask, visible, rows, stop - start)
            )
        if visible is None or visible.any():
            yield Keys(start, stop, visible)


def _masked(arrays: Arrays, rows: Rows, starts: Any, stops: Any) -> tuple[Any, Any]:
    """Return, for each tile of keys, whether mask_mod may be True somewhere, and whether it is True everywhere.

    Interval arithmetic decides for all tiles at once. No pair is looked at.
    """
    graph = arrays.problem.functions
    if graph.mask is None:
        return np.ones(len(starts), np.bool_), np.ones(len(starts), np.bool_)
    b = np.float64(rows.sequence.number)
    h = np.arange(rows.heads.start, rows.heads.stop, dtype=np.float64)[:, None]
    q = Interval(np.float64(rows.start), np.float64(rows.stop - 1))
    kv = Interval(starts.astype(np.float64), stops - 1.0)
    found = bounds(graph, (graph.mask,), Range(Interval(b, b), Interval(h, h), q, kv), arrays.extremes)[graph.mask]
    low, high = (np.broadcast_to(np.asarray(x, np.bool_), (len(h), len(starts))) for x in found)
    return high.any(axis=0), low.all(axis=0)


def _shape(mask: Floats, visible: Any, rows: Rows, keys: int) -> tuple[int, ...]:
    """Return the shape of the visible keys, with all queries and keys."""
    return np.broadcast_shapes(mask.shape, () if visible is None else visible.shape, (1, 1, rows.shape[2], keys))


def place(rows: Rows, start: int, stop: int) -> Place:
    """Return the indices of the pairs of a tile, which broadcast to (heads_kv, group, rows, keys)."""
    h = np.arange(rows.heads.start, rows.heads.stop).reshape(-1, rows.group, 1, 1)
    return Place(rows.sequence.number, h, np.arange(rows.start, rows.stop)[:, None], np.arange(start, stop))


def _listed(lists: npt.NDArray[np.int32], start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Return the slots [start, stop) that the lists (heads_kv, rows, n) name: (heads_kv, 1, rows, slots)."""
    heads_kv, rows, _ = lists.shape
    found = np.zeros((heads_kv, 1, rows, stop - start), np.bool_)
    head, row, entry = np.nonzero((lists >= start) & (lists < stop))
    found[head, 0, row, lists[head, row, entry] - start] = True
    return found


class Arrays:
    """Arrays of one call in host memory. Tiles are copies in the compute dtype."""

    def __init__(self, problem: Problem, call: Call) -> None:
        self.problem = problem
        self.kind = problem.compute_dtype
        self.number = np.dtype(self.kind).type
        self._call = call
        graph = problem.functions
        self.functions = Functions(graph, self.view("captured"), self.view("captured_indices"), self.kind)
        self.extremes = [] if graph.mask is None else [Extremes(array) for array in self.functions.arrays]

    def view(self, name: str) -> Any:
        """Return the named array, bfloat16 as uint16, or None if absent."""
        array = getattr(self._call, name)
        return None if array is None else self._call.adapter.numpy(array)

    def selected_keys(self, rows: Rows) -> npt.NDArray[np.int32] | None:
        """Return the key slot lists of the queries, (heads_kv or 1, rows, n), or None without kv_indices."""
        indices = self.view("kv_indices")
        if indices is None:
            return None
        lists = selected_keys(self.problem, rows.sequence, indices)[:, rows.start : rows.stop]
        return lists[rows.first : rows.last] if len(lists) > 1 else lists

    def sequences(self) -> Iterator[Sequence]:
        return sequences(self.problem, {name: self.view(name) for name in TABLES})

    def read_rows(self, name: str, rows: Rows) -> Floats:
        """Read (heads_kv, group * rows, dim) of q, out or dout."""
        described: Array = getattr(self.problem, name)
        tile = widen(self.view(name)[self._rows(rows)], described.dtype, self.kind)
        heads_kv, group, count = rows.shape
        return np.array(tile.swapaxes(0, 1), order="C").reshape(heads_kv, group * count, -1)

    def write_rows(self, name: str, rows: Rows, values: Floats) -> None:
        """Write (heads_kv, group * rows, dim) of out or dq."""
        heads_kv, group, count = rows.shape
        tile = values.reshape(heads_kv * group, count, -1).swapaxes(0, 1)
        self.view(name)[self._rows(rows)] = narrow(tile, self.problem.result_dtype)

    def read_numbers(self, name: str, rows: Rows) -> Floats:
        """Read (heads_kv, group, rows) of lse or dlse."""
        return np.asarray(self.view(name)[self._numbers(rows)].reshape(rows.shape))

    def write_numbers(self, name: str, rows: Rows, values: Floats) -> None:
        heads_kv, group, count = rows.shape
        self.view(name)[self._numbers(rows)] = values.reshape(heads_kv * group, count)

    def read_keys(self, name: str, rows: Rows, keys: Keys) -> Floats:
        """Read (heads_kv, keys, dim) of k or v. Keys that no query of the tile attends to may be NaN and become 0."""
        index = self.key_index(rows, keys)
        tile = widen(self.view(name)[index], self.problem.arrays[name].dtype, self.kind)
        if self.problem.quantised:
            *slots, heads = index
            scale = self.view(SCALES_OF[name])
            tile = tile * scales(self.problem, rows.sequence, scale, tuple(slots), heads)[..., None]
        tile = np.array(tile.swapaxes(0, 1), order="C")
        if keys.visible is not None:
            used = np.asarray(keys.visible.any(axis=(1, 2)))
            np.copyto(tile, 0, where=~used[..., None])
        return tile

    def key_index(self, rows: Rows, keys: Keys) -> tuple[Any, ...]:
        """Return the index of (keys, heads_kv, dim) in k, v, dk and dv."""
        sequence, heads = rows.sequence, slice(rows.first, rows.last)
        if self.problem.paged:
            slots = np.arange(keys.start, keys.stop)
            pages = self.view("block_table")[sequence.number][slots // self.problem.page_size]
            return (pages, slots % self.problem.page_size, heads)
        if self.problem.packed_k:
            return (slice(sequence.row_k + keys.start, sequence.row_k + keys.stop), heads)
        return (sequence.batch_k, slice(keys.start, keys.stop), heads)

    def of_heads(self, name: str, rows: Rows) -> Floats:
        """Return (heads_kv, group, 1) of sink or alibi_slopes."""
        array = self.view(name)
        array = array if array.ndim == 1 else array[rows.sequence.number]
        return np.asarray(array[rows.heads].reshape(-1, rows.group, 1))

    def _rows(self, rows: Rows) -> tuple[Any, ...]:
        """Return the index of (rows, heads, dim) in q, out, dout and dq."""
        sequence = rows.sequence
        if self.problem.packed_q:
            return (slice(sequence.row_q + rows.start, sequence.row_q + rows.stop), rows.heads)
        return (sequence.number, slice(rows.start, rows.stop), rows.heads)

    def _numbers(self, rows: Rows) -> tuple[Any, ...]:
        """Return the index of (heads, rows) in lse and dlse."""
        sequence = rows.sequence
        if self.problem.packed_q:
            return (rows.heads, slice(sequence.row_q + rows.start, sequence.row_q + rows.stop))
        return (sequence.number, rows.heads, slice(rows.start, rows.stop))


def score_tile(array: Floats, rows: Rows, keys: Keys) -> Floats:
    """Return a view (heads_kv, group, rows, keys) of bias, dbias or mask, with size 1 along broadcast axes."""
    b = rows.sequence.number
    wanted = (slice(b, b + 1), rows.heads, slice(rows.start, rows.stop), slice(keys.start, keys.stop))
    index = [slice(0, 1) if size == 1 else part for size, part in zip(array.shape, wanted, strict=True)]
    tile = array[tuple(index)][0]
    return np.asarray(tile.reshape(-1, rows.group if array.shape[1] > 1 else 1, *tile.shape[1:]))


class Sum:
    """Sum of many tiles in a gradient: in the compute dtype, or directly in the result if it has that dtype."""

    def __init__(self, arrays: Arrays, name: str) -> None:
        problem = arrays.problem
        described: Array | None = getattr(problem, name[1:])
        assert described is not None
        self._arrays = arrays
        self._dtype = problem.compute_dtype if problem.partial else described.dtype
        self._result = raw(arrays.view(name), self._dtype)
        scores = (problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k)
        # No sum is needed then, so that an array of O(N^2) is not stored twice.
        self._once = name == "dbias" and described.shape == scores
        in_place = self._dtype == arrays.kind or self._once
        self.values = self._result if in_place else np.zeros(described.shape, arrays.kind)
        self.values[...] = 0

    def add_keys(self, rows: Rows, keys: Keys, values: Floats) -> None:
        """Add (heads_kv, keys, dim) to dk or dv."""
        index, values = self._arrays.key_index(rows, keys), values.swapaxes(0, 1)
        if self._arrays.problem.paged:
            np.add.at(self.values, index, values)  # a page may be listed twice
        else:
            self.values[index] += values

    def add_scores(self, rows: Rows, keys: Keys, values: Floats) -> None:
        """Add (heads_kv, group, rows, keys) to dbias, summed over the axes along which the bias is broadcast."""
        tile = score_tile(self.values, rows, keys)
        if self._once:
            tile[...] = narrow(values, self._dtype)
        else:
            tile += values.sum(axis=tuple(axis for axis in range(4) if tile.shape[axis] == 1), keepdims=True)

    def finish(self) -> None:
        """Round the sums to the result's dtype."""
        if self.values is self._result:
            return
        step = max(1, TILE_ENTRIES // max(1, self.values[:1].size))
        for start in range(0, len(self.values), step):
            part = slice(start, start + step)
            self._result[part] = narrow(self.values[part], self._dtype)
