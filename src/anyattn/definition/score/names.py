"""Functions of a traced value by the names of Python, NumPy and torch, in terms of the operations of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .graph import BOOL, FLOAT, INT
from .operations import BINARY, UNARY
from .symbol import Symbol, active, node_of, operation, refuse

# Parameters have the names of torch, because functions are also called with keywords.


def _unary(name: str) -> Callable[..., Symbol]:
    return lambda input: operation(name, input)


def _binary(name: str) -> Callable[..., Symbol]:
    return lambda input, other: operation(name, input, other)


def _reflected(name: str) -> Callable[..., Symbol]:
    return lambda input, other: operation(name, other, input)


def _divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode == "floor":
        return operation("floordiv", input, other)
    if rounding_mode is not None:
        refuse(f"div with rounding_mode={rounding_mode!r} is not supported", 'Use rounding_mode="floor" or //.')
    return operation("div", input, other)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Symbol:
    return operation("add", input, other if alpha == 1 else operation("mul", other, alpha))


def _subtract(input: Any, other: Any, *, alpha: Any = 1) -> Symbol:
    return operation("sub", input, other if alpha == 1 else operation("mul", other, alpha))


def _power(input: Any, exponent: Any) -> Symbol:
    """Return a ** b. Small constant powers become products, which are exact for integers."""
    if isinstance(exponent, (int, float)) and exponent in (1, 2, 3, 4):
        x = operation("mul", input, 1)
        for _ in range(int(exponent) - 1):
            x = operation("mul", x, input)
        return x
    if isinstance(exponent, float) and exponent == 0.5:
        return operation("sqrt", input)
    return operation("pow", input, exponent)


def _clamp(input: Any, min: Any = None, max: Any = None, *, a_min: Any = None, a_max: Any = None) -> Symbol:
    low, high = min if a_min is None else a_min, max if a_max is None else a_max
    x = input if low is None else operation("max", input, low)
    return x if high is None else operation("min", x, high)


def _not(input: Any) -> Symbol:
    """Return ~x: the logical complement of booleans, the complement of bits of integers."""
    if isinstance(input, Symbol) and input.kind == INT:
        return operation("sub", operation("neg", input), 1)
    return operation("not", input)


def _logical(name: str) -> Callable[..., Symbol]:
    """Return a function of truth values: any number is true unless it is 0."""

    def logical(input: Any, *other: Any, **keywords: Any) -> Symbol:
        truth = _cast(BOOL)
        return operation(name, *[truth(x) for x in (input, *other, *keywords.values())])

    return logical


def _where(condition: Any, input: Any, other: Any) -> Symbol:
    return operation("where", condition, input, other)


def _is_nan(input: Any) -> Symbol:
    return operation("ne", input, input)


def _ignoring_nan(name: str) -> Callable[..., Symbol]:
    def extremum(input: Any, other: Any) -> Symbol:
        rest = operation("where", _is_nan(other), input, operation(name, input, other))
        return operation("where", _is_nan(input), other, rest)

    return extremum


def _rounded(name: str) -> Callable[..., Symbol]:
    """Return a function that rounds, and leaves integers as they are."""
    return lambda input: input if isinstance(input, Symbol) and input.kind == INT else operation(name, input)


def _ceil(input: Any) -> Symbol:
    return operation("neg", operation("floor", operation("neg", input)))


def _relu(input: Any, inplace: bool = False) -> Symbol:
    _check_writes(inplace)
    return operation("where", operation("le", input, 0), 0, input)


def _silu(input: Any, inplace: bool = False) -> Symbol:
    _check_writes(inplace)
    return operation("mul", input, operation("sigmoid", input))


def _check_writes(inplace: bool) -> None:
    if inplace:
        refuse("a score function must not write to a traced value", "Leave out inplace=True.")


def _cast(kind: str, largest: int = 0, sign: int = 0) -> Callable[..., Symbol]:
    """Return a cast. largest: bits of an integer that wraps around, with its sign bit; 0: it does not."""

    def cast(input: Any, *arguments: Any, **keywords: Any) -> Symbol:
        trace = active()
        x = node_of(trace, input)
        found = Symbol(trace, trace.builder.cast(x, kind))
        if not largest or trace.builder.kind(x) == BOOL:
            return found
        return operation("sub", operation("xor", operation("and", found, largest), sign), sign)

    return cast


def _to(input: Any, *arguments: Any, dtype: Any = None, **keywords: Any) -> Any:
    """Return x as another dtype; devices and other arguments of `to` do not change a value."""
    for candidate in (dtype, *arguments):
        cast = _cast_to(candidate)
        if cast is not None:
            return cast(input)
    return input


def _cast_to(dtype: Any) -> Callable[..., Symbol] | None:
    """Return the cast to a dtype of Python, NumPy or torch or to that of a value; None for anything else."""
    if isinstance(dtype, Symbol):
        return _cast(dtype.kind)
    if hasattr(dtype, "dtype") and not isinstance(dtype, type):
        dtype = dtype.dtype
    name = (getattr(dtype, "__name__", None) or str(dtype)).removeprefix("torch.")
    if name in _NARROW:
        return _cast(INT, *_NARROW[name])
    for start, kind in _KINDS.items():
        if name.startswith(start):
            return _cast(kind)
    return None


_NARROW = {"int8": (0xFF, 0x80), "uint8": (0xFF, 0), "int16": (0xFFFF, 0x8000), "uint16": (0xFFFF, 0)}
_KINDS = {
    **{"bool": BOOL, "int": INT, "uint": INT, "long": INT},
    **dict.fromkeys(("float", "bfloat", "half", "double"), FLOAT),
}


def _full(value: Any) -> Callable[..., Symbol]:
    def full(x: Any, *arguments: Any, dtype: Any = None, **keywords: Any) -> Symbol:
        sizes = keywords.get("size", arguments)
        if [size for size in sizes if size not in ((), [])]:
            refuse("a score function computes one number, not an array", "Use a scalar.")
        return _like(x, value, dtype)

    return full


def _like(x: Any, value: Any, dtype: Any) -> Symbol:
    """Return a value in a dtype, or in the kind of x."""
    trace = active()
    cast = _cast_to(dtype) or _cast(trace.builder.kind(node_of(trace, x)))
    return cast(value)


def _full_like(input: Any, fill_value: Any, **keywords: Any) -> Symbol:
    return _like(input, fill_value, keywords.get("dtype"))


def _new_full(input: Any, size: Any, fill_value: Any, **keywords: Any) -> Symbol:
    if tuple(size):
        refuse("a score function computes one number, not an array", "Use a scalar.")
    return _like(input, fill_value, keywords.get("dtype"))


def _new_tensor(x: Any, value: Any, **keywords: Any) -> Any:
    return _to(operation("where", True, value, value), dtype=keywords.get("dtype"))


TABLE: dict[str, Callable[..., Any]] = {
    **{name: _unary(name) for name in UNARY},
    **{name: _binary(name) for name in BINARY},
    **dict.fromkeys(("add", "radd"), _add),
    **dict.fromkeys(("sub", "subtract"), _subtract),
    "rsub": lambda input, other, *, alpha=1: _subtract(other, input, alpha=alpha),
    **dict.fromkeys(("mul", "multiply", "rmul"), _binary("mul")),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _divide),
    **dict.fromkeys(("rdiv", "rtruediv"), _reflected("div")),
    **dict.fromkeys(("floordiv", "floor_divide"), _binary("floordiv")),
    "rfloordiv": _reflected("floordiv"),
    **dict.fromkeys(("mod", "remainder"), _binary("mod")),
    "rmod": _reflected("mod"),
    **dict.fromkeys(("pow", "power", "float_power"), _power),
    "rpow": lambda input, other: _power(other, input),
    "square": lambda input: operation("mul", input, input),
    **dict.fromkeys(("neg", "negative"), _unary("neg")),
    **dict.fromkeys(("pos", "positive", "clone", "contiguous"), lambda input, **keywords: input),
    **dict.fromkeys(("abs", "absolute", "fabs"), _unary("abs")),
    "floor": _rounded("floor"),
    **dict.fromkeys(("round", "rint"), _rounded("round")),
    "ceil": lambda input: input if isinstance(input, Symbol) and input.kind == INT else _ceil(input),
    "exp2": lambda input: operation("exp", operation("mul", input, math.log(2.0))),
    "log2": lambda input: operation("mul", operation("log", input), 1.0 / math.log(2.0)),
    "rsqrt": lambda input: operation("div", 1.0, operation("sqrt", input)),
    "reciprocal": lambda input: operation("div", 1.0, input),
    "relu": _relu,
    "silu": _silu,
    **dict.fromkeys(("clamp", "clip"), _clamp),
    "clamp_min": _clamp,
    "clamp_max": lambda input, max: _clamp(input, None, max),
    "minimum": _binary("min"),
    "maximum": _binary("max"),
    "fmin": _ignoring_nan("min"),
    "fmax": _ignoring_nan("max"),
    **dict.fromkeys(("lt", "less"), _binary("lt")),
    **dict.fromkeys(("le", "less_equal"), _binary("le")),
    **dict.fromkeys(("gt", "greater"), _reflected("lt")),
    **dict.fromkeys(("ge", "greater_equal"), _reflected("le")),
    **dict.fromkeys(("eq", "equal"), _binary("eq")),
    **dict.fromkeys(("ne", "not_equal"), _binary("ne")),
    **{f"logical_{name}": _logical(name) for name in ("and", "or", "xor", "not")},
    **{f"bitwise_{name}": _binary(name) for name in ("and", "or", "xor")},
    "rand": _reflected("and"),
    "ror": _reflected("or"),
    **dict.fromkeys(("bitwise_not", "invert"), _not),
    **dict.fromkeys(("lshift", "left_shift", "bitwise_left_shift"), _binary("shl")),
    **dict.fromkeys(("rshift", "right_shift", "bitwise_right_shift"), _binary("shr")),
    "where": _where,
    "masked_fill": lambda input, mask, value: operation("where", mask, value, input),
    "isnan": _is_nan,
    **dict.fromkeys(("to", "type", "type_as", "astype"), _to),
    **dict.fromkeys(("float", "double", "half", "bfloat16"), _cast(FLOAT)),
    **dict.fromkeys(("int", "long"), _cast(INT)),
    "short": _cast(INT, *_NARROW["int16"]),
    "bool": _cast(BOOL),
    **dict.fromkeys(("new_ones", "ones_like"), _full(1)),
    **dict.fromkeys(("new_zeros", "zeros_like"), _full(0)),
    "full_like": _full_like,
    "new_full": _new_full,
    "new_tensor": _new_tensor,
}
