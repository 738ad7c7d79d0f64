"""Rules of interval arithmetic: the bounds of an operation's result from the bounds of its arguments.

An interval of booleans is (0, 0) if the value is False everywhere, (1, 1) if it is True everywhere, and (0, 1) if it
may be either. Bounds are float64, which holds every int32, and are never too tight: floating-point results are widened
by more than the rounding of the compute dtype, and a value that may be NaN has the bounds (-inf, inf).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .graph import BOOL, FLOAT, INT

ROUNDING = 2.0**-18  # relative; float32 rounds by 2^-24, and its functions by a few units more
LARGEST, SMALLEST = 3e38, 1e-37  # of float32, nearly; smaller numbers may become 0
INFINITY = np.float64(np.inf)


class Interval(NamedTuple):
    """Least and largest value, for each of the ranges that are examined together."""

    low: Any
    high: Any


def unknown(where: Any, found: Interval) -> Interval:
    """Return the interval with the bounds (-inf, inf) where the value may be NaN."""
    return Interval(choose(where, -INFINITY, found.low), choose(where, INFINITY, found.high))


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """Return np.where(condition, yes, no), which is slow for one number."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, yes, no)
    return yes if condition else no


def widened(operation: str, found: Interval, arguments: Sequence[Interval]) -> Interval:
    """Return the interval of a floating-point result with room for its rounding; without bounds if it may be NaN."""
    lost = np.isnan(found.low) | np.isnan(found.high)
    if operation != "where":
        for low, high in arguments:
            lost = lost | ((low == -np.inf) & (high == np.inf))
    found = unknown(lost, found)
    if operation in _UNROUNDED:
        return found
    room = np.maximum(np.abs(found.low), np.abs(found.high)) * ROUNDING + SMALLEST
    room = choose(np.isfinite(room), room, 0)
    below, above = (room * _is_rounded(bound) if operation in _ROUNDED_ONCE else room for bound in found)
    low, high = found.low - below, found.high + above
    return Interval(choose(low < -LARGEST, -INFINITY, low), choose(high > LARGEST, INFINITY, high))


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
    found = widened("div", _quotient(FLOAT, a, b), (a, b))
    return Interval(np.floor(found.low), np.floor(found.high))


def _remainder(kind: str, a: Interval, b: Interval) -> Interval:
    """Return the bounds of a mod b: exact for one integer divisor and a range that no multiple of it crosses."""
    size = np.maximum(np.abs(b.low), np.abs(b.high)) - (1 if kind == INT else 0)
    low, high = np.where(b.low < 0, -size, 0.0), np.where(b.high > 0, size, 0.0)
    if kind != INT:
        return unknown(~np.isfinite(a.low + a.high) | ((b.low <= 0) & (b.high >= 0)), Interval(low, high))
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
    return unknown(~(a.low > 0), found)


def _sum(sign: int) -> Callable[..., Interval]:
    def rule(kind: str, a: Interval, b: Interval) -> Interval:
        if sign > 0:
            return Interval(a.low + b.low, a.high + b.high)
        return Interval(a.low - b.high, a.high - b.low)

    return rule


def _product(kind: str, a: Interval, b: Interval) -> Interval:
    nan = _is_infinite(a) & _contains_zero(b) | _is_infinite(b) & _contains_zero(a)
    return unknown(nan, _corners(np.multiply, a, b))


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
