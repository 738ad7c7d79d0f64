"""Interval arithmetic over a graph: bounds of every value for whole ranges of indices, without looking at any pair.

An interval of booleans is (0, 0) if the value is False everywhere, (1, 1) if it is True everywhere, and (0, 1) if it
may be either. Bounds are float64, which holds every int32, and are never too tight: floating-point results are widened
by more than the rounding of the compute dtype, and a value that may be NaN has the bounds (-inf, inf).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .graph import BOOL, CONSTANT, FLOAT, INT, READ, SCORE, Graph

Values = npt.NDArray[Any]
ROUNDING = 2.0**-18  # relative; float32 rounds by 2^-24, and its functions by a few units more
LARGEST, SMALLEST = 3e38, 1e-37  # of float32, nearly; smaller numbers may become 0
LARGEST_SHIFT = 31
INFINITY = np.float64(np.inf)
BLOCK = 64  # array elements for which the least and the largest are stored


class Interval(NamedTuple):
    """Least and largest value, for each of the ranges that are examined together."""

    low: Any
    high: Any


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
    with np.errstate(all="ignore"):
        for number in _order(graph, tuple(wanted)):
            node = graph.nodes[number]
            arguments = [found[one] for one in node.arguments]
            if node.operation == CONSTANT:
                value = np.float64(node.value)
                known = _stored(value) if node.kind == FLOAT else Interval(value, value)
                found[number] = _unknown(np.isnan(value), known)
            elif node.operation == READ:
                found[number] = arrays[int(node.value or 0)].of(arguments)
            elif node.operation in inputs:
                found[number] = inputs[node.operation]
            else:
                kind = graph.nodes[node.arguments[-1]].kind
                result = RULES[node.operation](kind, *arguments)
                is_float = node.kind == FLOAT
                found[number] = _widened(node.operation, result, arguments) if is_float else result
    return found


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
    low, high = np.min(index.low), np.max(index.high)
    if low < 0 or high >= size:
        raise ValueError(
            f"an index of a captured array of shape {shape} must be from 0 to {size - 1} on axis {axis}, "
            f"got {low:.0f} to {high:.0f} for this call. Clamp the index, also for pairs that the mask excludes."
        )


def _unknown(where: Any, found: Interval) -> Interval:
    """Return the interval with the bounds (-inf, inf) where the value may be NaN."""
    return Interval(_choose(where, -INFINITY, found.low), _choose(where, INFINITY, found.high))


def _choose(condition: Any, yes: Any, no: Any) -> Any:
    """Return np.where(condition, yes, no), which is slow for one number."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, yes, no)
    return yes if condition else no


def _widened(operation: str, found: Interval, arguments: Sequence[Interval]) -> Interval:
    """Return the interval of a floating-point result with room for its rounding; without bounds if it may be NaN."""
    unknown = np.isnan(found.low) | np.isnan(found.high)
    if operation != "where":
        for low, high in arguments:
            unknown = unknown | ((low == -np.inf) & (high == np.inf))
    found = _unknown(unknown, found)
    if operation in _UNROUNDED:
        return found
    room = np.maximum(np.abs(found.low), np.abs(found.high)) * ROUNDING + SMALLEST
    room = _choose(np.isfinite(room), room, 0)
    below, above = (room * _is_rounded(bound) if operation in _ROUNDED_ONCE else room for bound in found)
    low, high = found.low - below, found.high + above
    return Interval(_choose(low < -LARGEST, -INFINITY, low), _choose(high > LARGEST, INFINITY, high))


def _is_rounded(bound: Any) -> Any:
    """Return whether a result may be rounded beyond a bound: not if float32 holds it, because rounding is monotone.

    The bound is scaled, so that numbers that are nearly too small for float32 count as rounded.
    """
    return np.float32(bound * 2.0**-40) * 2.0**40 != bound


_UNROUNDED = ("neg", "abs", "sign", "floor", "round", "min", "max", "where")
_ROUNDED_ONCE = ("add", "sub", "mul", "div", "to_float")  # every backend rounds them correctly


def _corners(function: Callable[..., Any], a: Interval, b: Interval) -> Interval:
    """Return the bounds of a function that is monotone in each argument; NaN if a corner is NaN."""
    first, *rest = [function(x, y) for x in a for y in b]
    low = high = first
    for corner in rest:
        low, high = np.minimum(low, corner), np.maximum(high, corner)
    return Interval(low, high)


def _quotient(kind: str, a: Interval, b: Interval) -> Interval:
    """Return the bounds of a // b or, for floating-point numbers, a / b. A divisor that may be 0 gives no bounds."""
    corners = _corners(lambda x, y: x / y, a, b)
    crosses = (b.low <= 0) & (b.high >= 0)
    low, high = np.where(crosses, -np.inf, corners.low), np.where(crosses, np.inf, corners.high)
    if kind == INT:
        largest = np.maximum(np.abs(a.low), np.abs(a.high))  # a quotient is not larger, and that by 0 is 0
        low, high = np.maximum(np.floor(low), -largest - 1), np.minimum(np.floor(high), largest)
    return Interval(low, high)


def _floor_quotient(kind: str, a: Interval, b: Interval) -> Interval:
    if kind == INT:
        return _quotient(INT, a, b)
    found = _widened("div", _quotient(FLOAT, a, b), (a, b))
    return Interval(np.floor(found.low), np.floor(found.high))


def _remainder(kind: str, a: Interval, b: Interval) -> Interval:
    """Return the bounds of a mod b: exact for one integer divisor and a range that no multiple of it crosses."""
    size = np.maximum(np.abs(b.low), np.abs(b.high)) - (1 if kind == INT else 0)
    low, high = np.where(b.low < 0, -size, 0.0), np.where(b.high > 0, size, 0.0)
    if kind != INT:
        return _unknown(~np.isfinite(a.low + a.high) | ((b.low <= 0) & (b.high >= 0)), Interval(low, high))
    one = (b.low == b.high) & (b.low > 0)
    divisor = np.where(one, b.low, 1)
    inside = one & (np.floor(a.low / divisor) == np.floor(a.high / divisor))
    return Interval(np.where(inside, np.mod(a.low, divisor), low), np.where(inside, np.mod(a.high, divisor), high))


def _compare(strict: bool) -> Callable[..., Interval]:
    def rule(kind: str, a: Interval, b: Interval) -> Interval:
        if strict:
            return Interval(a.high < b.low, a.low < b.high)
        certain = a.high <= b.low
        if kind == FLOAT:  # (-inf, inf) may be NaN
            certain = certain & (a.low > -np.inf) & (b.high < np.inf)
        return Interval(certain, a.low <= b.high)

    return rule


def _equal(kind: str, a: Interval, b: Interval) -> Interval:
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    if kind == FLOAT:
        same = same & np.isfinite(a.low)
    return Interval(same, (a.low <= b.high) & (b.low <= a.high))


def _unequal(kind: str, a: Interval, b: Interval) -> Interval:
    found = _equal(kind, a, b)
    return Interval(np.logical_not(found.high), np.logical_not(found.low))


def _where(kind: str, condition: Interval, yes: Interval, no: Interval) -> Interval:
    always, never = np.asarray(condition.low, np.bool_), np.logical_not(condition.high)
    low = np.where(always, yes.low, np.where(never, no.low, np.minimum(yes.low, no.low)))
    high = np.where(always, yes.high, np.where(never, no.high, np.maximum(yes.high, no.high)))
    return Interval(low, high)


def _bits(name: str) -> Callable[..., Interval]:
    def rule(kind: str, a: Interval, b: Interval) -> Interval:
        if kind == BOOL:
            return _logical(name, a, b)
        if name == "and":  # not above an argument that is not negative
            negative = (a.low < 0) & (b.low < 0)
            high = np.minimum(*[np.where(x.low < 0, 2.0**31 - 1, x.high) for x in (a, b)])
        else:
            negative = (a.low < 0) | (b.low < 0)
            ones = np.exp2(np.floor(np.log2(np.maximum(np.maximum(a.high, b.high), 1))) + 1) - 1
            high = np.where(negative, 2.0**31 - 1, ones)
        same = (a.low == a.high) & (b.low == b.high)
        ints = [np.where(same, x.low, 0).astype(np.int64) for x in (a, b)]
        exact = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name](*ints)
        return Interval(np.where(same, exact, np.where(negative, -(2.0**31), 0)), np.where(same, exact, high))

    return rule


def _logical(name: str, a: Interval, b: Interval) -> Interval:
    al, ah, bl, bh = (np.asarray(x, np.bool_) for x in (*a, *b))
    if name == "and":
        return Interval(al & bl, ah & bh)
    if name == "or":
        return Interval(al | bl, ah | bh)
    return Interval((al & ~bh) | (~ah & bl), (ah & ~bl) | (~al & bh))


def _absolute(kind: str, a: Interval) -> Interval:
    low, high = np.abs(a.low), np.abs(a.high)
    inside = (a.low <= 0) & (a.high >= 0)
    return Interval(np.where(inside, 0.0, np.minimum(low, high)), np.maximum(low, high))


def _monotone(function: Callable[..., Any]) -> Callable[..., Interval]:
    return lambda kind, a: Interval(function(a.low), function(a.high))


def _power(kind: str, a: Interval, b: Interval) -> Interval:
    found = _corners(np.power, a, b)
    return _unknown(~(a.low > 0), found)


def _sum(sign: int) -> Callable[..., Interval]:
    def rule(kind: str, a: Interval, b: Interval) -> Interval:
        if sign > 0:
            return Interval(a.low + b.low, a.high + b.high)
        return Interval(a.low - b.high, a.high - b.low)

    return rule


def _product(kind: str, a: Interval, b: Interval) -> Interval:
    nan = _is_infinite(a) & _contains_zero(b) | _is_infinite(b) & _contains_zero(a)
    return _unknown(nan, _corners(np.multiply, a, b))


def _is_infinite(x: Interval) -> Any:
    return np.isinf(x.low) | np.isinf(x.high)


def _contains_zero(x: Interval) -> Any:
    return (x.low <= 0) & (x.high >= 0)


def _shift(kind: str, a: Interval, b: Interval) -> Interval:
    return _corners(lambda x, y: np.floor(x / np.exp2(y)), a, b)


def _truncate(kind: str, a: Interval) -> Interval:
    return Interval(np.trunc(np.maximum(a.low, -(2.0**31))), np.trunc(np.minimum(a.high, 2.0**31 - 1)))


def _wave(kind: str, a: Interval) -> Interval:
    zero = 0 * np.sign(a.low + a.high)
    return Interval(zero - 1.0, zero + 1.0)


RULES: dict[str, Callable[..., Interval]] = {
    "neg": lambda kind, a: Interval(-a.high, -a.low),
    "abs": _absolute,
    **{
        name: _monotone(function)
        for name, function in (
            *(("sign", np.sign), ("floor", np.floor), ("round", np.rint), ("exp", np.exp), ("log", np.log)),
            *(("sqrt", np.sqrt), ("tanh", np.tanh), ("sigmoid", lambda x: 1 / (1 + np.exp(-x)))),
        )
    },
    **dict.fromkeys(("sin", "cos"), _wave),
    "add": _sum(1),
    "sub": _sum(-1),
    "mul": _product,
    "div": _quotient,
    "pow": _power,
    "floordiv": _floor_quotient,
    "mod": _remainder,
    "min": lambda kind, a, b: Interval(np.minimum(a.low, b.low), np.minimum(a.high, b.high)),
    "max": lambda kind, a, b: Interval(np.maximum(a.low, b.low), np.maximum(a.high, b.high)),
    "lt": _compare(strict=True),
    "le": _compare(strict=False),
    "eq": _equal,
    "ne": _unequal,
    "and": _bits("and"),
    "or": _bits("or"),
    "xor": _bits("xor"),
    "not": lambda kind, a: Interval(np.logical_not(a.high), np.logical_not(a.low)),
    "shl": lambda kind, a, b: _corners(lambda x, y: x * np.exp2(y), a, b),
    "shr": _shift,
    "where": _where,
    "to_float": lambda kind, a: Interval(np.asarray(a.low, np.float64), np.asarray(a.high, np.float64)),
    "to_int": _truncate,
    "to_bool": lambda kind, a: _unequal(kind, a, Interval(np.float64(0), np.float64(0))),
}
