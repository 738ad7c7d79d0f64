"""Interval arithmetic over a graph: bounds of every value for whole ranges of indices, without looking at any pair.

The intervals and the rule of each operation are those of interval_rules.py.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .graph import CONSTANT, FLOAT, INT, READ, SCORE, Graph
from .interval_rules import RULES, Interval, choose, unknown, widened

Values = npt.NDArray[Any]
LARGEST_SHIFT = 31
BLOCK = 64  # array elements for which the least and the largest are stored


class Range(NamedTuple):
    """Ranges of indices that are examined together; each is an interval of integers, both ends included."""

    b: Interval
    h: Interval
    q_idx: Interval
    kv_idx: Interval


def bounds(graph: Graph, wanted: Sequence[int], ranges: Range, arrays: Sequence[Extremes]) -> dict[int, Interval]:
    """Return the intervals of the wanted nodes and of all nodes that they depend on."""
    found: dict[int, Interval] = {}
    inputs: Mapping[str, Interval] = {**ranges._asdict(), SCORE: Interval(-np.inf, np.inf)}

    def interval(number: int, arguments: Sequence[Interval]) -> Interval:
        node = graph.nodes[number]
        if node.operation == CONSTANT:
            value = np.float64(node.value)
            known = _stored(value) if node.kind == FLOAT else Interval(value, value)
            return unknown(np.isnan(value), known)
        if node.operation == READ:
            return arrays[int(node.value or 0)].of(arguments)
        if node.operation in inputs:
            return inputs[node.operation]
        result = RULES[node.operation](graph.nodes[node.arguments[-1]].kind, *arguments)
        return widened(node.operation, result, arguments) if node.kind == FLOAT else result

    def chosen(branch: int, condition: int, *, truth: bool) -> Interval:
        """Return the interval of a branch of `where`, which is computed again for what its condition says."""
        assumed = _assumed(graph, condition, found, truth=truth)
        for number in _order(graph, (branch,)) if assumed else ():
            arguments = graph.nodes[number].arguments
            if number not in assumed and any(one in assumed for one in arguments):
                assumed[number] = interval(number, [assumed.get(one, found[one]) for one in arguments])
        return _intersection(found[branch], assumed[branch]) if branch in assumed else found[branch]

    with np.errstate(all="ignore"):
        for number in _order(graph, tuple(wanted)):
            node = graph.nodes[number]
            given = [found[one] for one in node.arguments]
            if node.operation == "where":
                condition, yes, no = node.arguments
                given[1:] = chosen(yes, condition, truth=True), chosen(no, condition, truth=False)
            found[number] = interval(number, given)
    return found


def _assumed(graph: Graph, condition: int, found: Mapping[int, Interval], *, truth: bool) -> dict[int, Interval]:
    """Return the intervals of integers that a comparison bounds where it is true, or where it is false."""
    node = graph.nodes[condition]
    if node.operation not in ("lt", "le") or graph.nodes[node.arguments[0]].kind != INT:
        return {}
    small, large = node.arguments if truth else node.arguments[::-1]
    gap = int((node.operation == "lt") == truth)  # small + gap <= large
    below, above = found[small], found[large]
    return {
        small: _intersection(below, Interval(below.low, above.high - gap)),
        large: _intersection(above, Interval(below.low + gap, above.high)),
    }


def _intersection(a: Interval, b: Interval) -> Interval:
    """Return the common part of two intervals; the first one where they have none."""
    low, high = np.maximum(a.low, b.low), np.minimum(a.high, b.high)
    return Interval(choose(low <= high, low, a.low), choose(low <= high, high, a.high))


@lru_cache(256)
def _order(graph: Graph, wanted: tuple[int, ...]) -> list[int]:
    return graph.reachable(wanted)


class Extremes:
    """Least and largest element of any range of a captured array, from those of its blocks."""

    def __init__(self, array: Values) -> None:
        self.shape = array.shape
        flat = np.ascontiguousarray(array).reshape(-1)
        starts = np.arange(0, flat.size, BLOCK)
        self._flat, self._empty = flat, flat.size == 0
        if self._empty:
            return
        low, high = np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)  # NaN if a block has one
        if flat.dtype == np.float64:
            with np.errstate(over="ignore"):
                low, high = _stored(low).low, _stored(high).high
        self._low = _doubled(np.where(np.isnan(low), -np.inf, low).astype(np.float64), np.minimum)
        self._high = _doubled(np.where(np.isnan(high), np.inf, high).astype(np.float64), np.maximum)

    def of(self, indices: Sequence[Interval]) -> Interval:
        """Return the bounds of the elements whose indices lie in these intervals. Indices outside are moved inside."""
        if self._empty:
            return Interval(-np.inf, np.inf)
        first = last = np.int64(0)
        for index, size in zip(indices, self.shape, strict=True):
            first = first * size + np.clip(index.low, 0, size - 1).astype(np.int64)
            last = last * size + np.clip(index.high, 0, size - 1).astype(np.int64)
        if np.array_equal(first, last) and not np.isnan(self._flat[first]).any():
            exact = self._flat[first].astype(np.float64)
            return _stored(exact) if self._flat.dtype == np.float64 else Interval(exact, exact)
        first, last = np.broadcast_arrays(first // BLOCK, last // BLOCK)
        level = np.frexp(last - first + 1.0)[1] - 1  # floor(log2(number of blocks))
        second = last - (np.int64(1) << level.astype(np.int64)) + 1
        low = np.minimum(self._low[level, first], self._low[level, second])
        high = np.maximum(self._high[level, first], self._high[level, second])
        return Interval(low, high)


def _stored(value: Any) -> Interval:
    """Return the bounds of a number in float64 or rounded to float32: the compute dtype is not known here."""
    single = np.float32(value)
    return Interval(np.minimum(value, single), np.maximum(value, single))


def _doubled(blocks: Values, extreme: np.ufunc) -> Values:
    """Return a table whose entry (level, i) is the extreme of the 2^level blocks from block i."""
    levels = [blocks]
    step = 1
    while 2 * step <= len(blocks):
        last = levels[-1].copy()
        last[: len(blocks) - step] = extreme(last[: len(blocks) - step], levels[-1][step:])
        levels.append(last)
        step *= 2
    return np.stack(levels)


def check(graph: Graph, ranges: Range, indices: Sequence[Any], unknown: Container[int] = ()) -> None:
    """Raise if a read may leave its array, or an integer the range of int32, for indices in these ranges.

    Args:
        graph: the functions.
        ranges: of the indices.
        indices: the values of captured arrays of integers and booleans; others are not looked at.
        unknown: nodes that are not checked.

    Raises:
        ValueError: the message names the array and the range of the index.
    """
    results = [result for result in (graph.score, graph.mask) if result is not None]
    arrays = [Extremes(np.empty(0) if x is None else x) for x in indices]
    every = bounds(graph, results, ranges, arrays)
    for number, found in every.items():
        node = graph.nodes[number]
        low, high = np.min(found.low), np.max(found.high)
        if node.kind == INT and number not in unknown and (low < -(2.0**31) or high >= 2.0**31):
            raise ValueError(
                f"integers in a score function must fit in int32, got {node.operation} from {low:.0f} to {high:.0f}. "
                "Clamp them as integers, or convert them to floating point first."
            )
        if node.operation in ("shl", "shr") and node.arguments[1] not in unknown:
            _check_shift(every[node.arguments[1]])
    for number in graph.reads:
        node = graph.nodes[number]
        array = graph.arrays[int(node.value or 0)]
        for axis, (argument, size) in enumerate(zip(node.arguments, array.shape, strict=True)):
            if argument in every and argument not in unknown:
                _check_index(every[argument], axis, size, array.shape)


def _check_shift(count: Interval) -> None:
    low, high = np.min(count.low), np.max(count.high)
    if low < 0 or high > LARGEST_SHIFT:
        raise ValueError(
            f"a shift in a score function must be by 0 to {LARGEST_SHIFT} bits, got {low:.0f} to {high:.0f}. "
            "Clamp the number of bits."
        )


def _check_index(index: Interval, axis: int, size: int, shape: tuple[int, ...]) -> None:
    low, high = np.min(index.low) + 0.0, np.max(index.high) + 0.0  # 0.0 instead of -0.0
    if low < 0 or high >= size:
        raise ValueError(
            f"an index of a captured array of shape {shape} must be from 0 to {size - 1} on axis {axis}, "
            f"got {low:.0f} to {high:.0f} for this call. Clamp the index, also for pairs that the mask excludes."
        )
