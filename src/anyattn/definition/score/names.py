"""Functions of a traced value by the names of Python, NumPy and torch, in terms of the operations of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .graph import BOOL, FLOAT, INT
from .operations import BINARY, UNARY
from .symbol import Symbol, active, node_of, operation, refuse


def _named(name: str) -> Callable[..., Symbol]:
    return lambda *arguments: operation(name, *arguments)


def _divide(a: Any, b: Any, *, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode == "floor":
        return operation("floordiv", a, b)
    if rounding_mode is not None:
        refuse(f"div with rounding_mode={rounding_mode!r} is not supported", 'Use rounding_mode="floor" or //.')
    return operation("div", a, b)


def _add(a: Any, b: Any, *, alpha: Any = 1) -> Symbol:
    return operation("add", a, b if alpha == 1 else operation("mul", b, alpha))


def _subtract(a: Any, b: Any, *, alpha: Any = 1) -> Symbol:
    return operation("sub", a, b if alpha == 1 else operation("mul", b, alpha))


def _power(a: Any, b: Any) -> Symbol:
    """Return a ** b. Small constant powers become products, which are exact for integers."""
    if isinstance(b, (int, float)) and b in (1, 2, 3, 4):
        x = operation("mul", a, 1)
        for _ in range(int(b) - 1):
            x = operation("mul", x, a)
        return x
    if isinstance(b, float) and b == 0.5:
        return operation("sqrt", a)
    return operation("pow", a, b)


def _clamp(x: Any, min: Any = None, max: Any = None, **bounds: Any) -> Symbol:
    low, high = bounds.get("a_min", min), bounds.get("a_max", max)
    x = x if low is None else operation("max", x, low)
    return x if high is None else operation("min", x, high)


def _not(x: Any) -> Symbol:
    """Return ~x: the logical complement of booleans, the complement of bits of integers."""
    if isinstance(x, Symbol) and x.kind == INT:
        return operation("sub", operation("neg", x), 1)
    return operation("not", x)


def _where(condition: Any, yes: Any, no: Any) -> Symbol:
    return operation("where", condition, yes, no)


def _is_nan(x: Any) -> Symbol:
    return operation("ne", x, x)


def _cast(kind: str) -> Callable[..., Symbol]:
    def cast(x: Any, *arguments: Any, **keywords: Any) -> Symbol:
        trace = active()
        return Symbol(trace, trace.builder.cast(node_of(trace, x), kind))

    return cast


def _to(x: Any, *arguments: Any, dtype: Any = None, **keywords: Any) -> Any:
    """Return x as another dtype; devices and other arguments of `to` do not change a value."""
    for candidate in (dtype, *arguments):
        kind = _kind(candidate)
        if kind is not None:
            return _cast(kind)(x)
    return x


def _kind(dtype: Any) -> str | None:
    """Return the kind of a dtype of Python, NumPy or torch, or None for anything else."""
    name = (getattr(dtype, "__name__", None) or str(dtype)).removeprefix("torch.")
    for start, kind in (("bool", BOOL), ("int", INT), ("uint", INT), ("float", FLOAT), ("bfloat", FLOAT)):
        if name.startswith(start):
            return kind
    return INT if name == "long" else FLOAT if name in ("half", "double") else None


def _full(value: Any) -> Callable[..., Symbol]:
    def full(x: Any, *arguments: Any, dtype: Any = None, **keywords: Any) -> Symbol:
        sizes = keywords.get("size", arguments)
        if [size for size in sizes if size not in ((), [])]:
            refuse("a score function computes one number, not an array", "Use a scalar.")
        trace = active()
        found = trace.builder.constant(value)
        return Symbol(trace, trace.builder.cast(found, _kind(dtype) or trace.builder.kind(node_of(trace, x))))

    return full


def _full_like(x: Any, value: Any, **keywords: Any) -> Symbol:
    return _to(operation("where", True, value, x), dtype=keywords.get("dtype"))  # type: ignore[no-any-return]


def _new_tensor(x: Any, value: Any, **keywords: Any) -> Any:
    return _to(operation("where", True, value, value), dtype=keywords.get("dtype"))


TABLE: dict[str, Callable[..., Any]] = {
    **{name: _named(name) for name in (*UNARY, *BINARY)},
    **dict.fromkeys(("add", "radd"), _add),
    **dict.fromkeys(("sub", "subtract"), _subtract),
    **dict.fromkeys(("rsub",), lambda a, b, alpha=1: _subtract(b, a, alpha=alpha)),
    **dict.fromkeys(("mul", "multiply", "rmul"), _named("mul")),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _divide),
    **dict.fromkeys(("rdiv", "rtruediv"), lambda a, b: _divide(b, a)),
    **dict.fromkeys(("floordiv", "floor_divide"), _named("floordiv")),
    "rfloordiv": lambda a, b: operation("floordiv", b, a),
    **dict.fromkeys(("mod", "remainder"), _named("mod")),
    "rmod": lambda a, b: operation("mod", b, a),
    **dict.fromkeys(("pow", "power", "float_power"), _power),
    "rpow": lambda a, b: _power(b, a),
    "square": lambda x: operation("mul", x, x),
    **dict.fromkeys(("neg", "negative"), _named("neg")),
    **dict.fromkeys(("pos", "positive", "clone", "contiguous"), lambda x, **keywords: x),
    **dict.fromkeys(("abs", "absolute", "fabs"), _named("abs")),
    **dict.fromkeys(("round", "rint"), _named("round")),
    "ceil": lambda x: operation("neg", operation("floor", operation("neg", x))),
    "exp2": lambda x: operation("exp", operation("mul", x, math.log(2.0))),
    "log2": lambda x: operation("mul", operation("log", x), 1.0 / math.log(2.0)),
    "rsqrt": lambda x: operation("div", 1.0, operation("sqrt", x)),
    "reciprocal": lambda x: operation("div", 1.0, x),
    "relu": lambda x: operation("where", operation("lt", 0.0, x), x, 0.0),
    "silu": lambda x: operation("mul", x, operation("sigmoid", x)),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, None, high),
    **dict.fromkeys(("minimum", "fmin"), _named("min")),
    **dict.fromkeys(("maximum", "fmax"), _named("max")),
    **dict.fromkeys(("lt", "less"), _named("lt")),
    **dict.fromkeys(("le", "less_equal"), _named("le")),
    **dict.fromkeys(("gt", "greater"), lambda a, b: operation("lt", b, a)),
    **dict.fromkeys(("ge", "greater_equal"), lambda a, b: operation("le", b, a)),
    **dict.fromkeys(("eq", "equal"), _named("eq")),
    **dict.fromkeys(("ne", "not_equal"), _named("ne")),
    **{f"logical_{name}": _named(name) for name in ("and", "or", "xor")},
    **{f"bitwise_{name}": _named(name) for name in ("and", "or", "xor")},
    **dict.fromkeys(("rand",), lambda a, b: operation("and", b, a)),
    **dict.fromkeys(("ror",), lambda a, b: operation("or", b, a)),
    **dict.fromkeys(("logical_not", "bitwise_not", "invert"), _not),
    **dict.fromkeys(("lshift", "left_shift", "bitwise_left_shift"), _named("shl")),
    **dict.fromkeys(("rshift", "right_shift", "bitwise_right_shift"), _named("shr")),
    "where": _where,
    "masked_fill": lambda x, mask, value: operation("where", mask, value, x),
    **dict.fromkeys(("isnan",), _is_nan),
    **dict.fromkeys(("to", "type", "astype"), _to),
    **dict.fromkeys(("float", "double", "half", "bfloat16"), _cast(FLOAT)),
    **dict.fromkeys(("int", "long", "short"), _cast(INT)),
    "bool": _cast(BOOL),
    **dict.fromkeys(("new_ones", "ones_like"), _full(1)),
    **dict.fromkeys(("new_zeros", "zeros_like"), _full(0)),
    "full_like": _full_like,
    "new_tensor": _new_tensor,
}
for _name in ("and", "or"):  # of booleans: any number is true unless it is 0
    TABLE[f"logical_{_name}"] = lambda a, b, name=_name: operation(name, _cast(BOOL)(a), _cast(BOOL)(b))
