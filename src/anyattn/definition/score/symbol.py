"""Symbols: the values with which a score function is called once, to record its operations in a graph.

A symbol behaves like a number of Python, and understands functions of NumPy and of torch by their names. It never
imports torch: torch calls `__torch_function__` of its arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

import numpy as np

from .builder import Builder, KindError
from .graph import BOOL, FLOAT, INT, Captured

_KINDS = {FLOAT: "floating-point values", INT: "integers", BOOL: "booleans"}
FUNCTIONS: dict[str, Callable[..., Any]] = {}  # by the names of Python, NumPy and torch; trace.py fills it
SUPPORTED = (
    "Supported are operators, comparisons, where, minimum, maximum, clamp, abs, sign, floor, ceil, round, exp, log, "
    "sqrt, tanh, sigmoid, sin, cos, pow, logical and bitwise functions, and casts."
)
_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
_LIBRARIES = tuple(f"{sep}{name}{sep}" for name in ("torch", "numpy") for sep in ("/", "\\"))


class Trace:
    """Recording of one call's functions: the graph under construction, and the captured arrays in order of use.

    dtypes: the framework's dtype of each kind of values, which functions may ask for; empty: they may not.
    """

    def __init__(self, dtypes: Mapping[str, Any]) -> None:
        self.dtypes = dtypes
        self.builder = Builder()
        self.arrays: list[Any] = []
        self.captured: list[Captured] = []

    def number(self, array: Any) -> int:
        """Return the number of a captured array."""
        for number, known in enumerate(self.arrays):
            if known is array:
                return number
        self.arrays.append(array)
        self.captured.append(describe(array))
        return len(self.arrays) - 1


current: ContextVar[Trace | None] = ContextVar("anyattn_trace", default=None)


def active() -> Trace:
    """Return the recording in progress."""
    trace = current.get()
    if trace is None:
        raise RuntimeError("a captured array must be read inside a score function or a mask function.")
    return trace


def describe(array: Any) -> Captured:
    """Return the metadata of a captured array. A gradient is wanted of every array that may have one."""
    name = str(array.dtype).removeprefix("torch.")
    shape = tuple(int(size) for size in array.shape)
    if name == "bool":
        return Captured(shape, BOOL)
    if name.startswith(("int", "uint")):
        return Captured(shape, INT)
    if name.startswith(("float", "bfloat")):
        return Captured(shape, FLOAT, bool(getattr(array, "requires_grad", True)))
    raise TypeError(f"a captured array must hold real numbers, integers or booleans, got dtype {name}.")


def refuse(what: str, remedy: str, error: type[Exception] = NotImplementedError) -> NoReturn:
    """Raise an error that names the operation, the line of the user's function and the remedy."""
    raise error(f"{what}{_line()}. {remedy}")


def _line() -> str:
    """Return " (file:line)" of the innermost frame outside this package, torch and NumPy."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        inside = name.startswith((_PACKAGE, "<__array_function__")) or any(part in name for part in _LIBRARIES)
        if not inside:
            return f" ({name}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class Symbol:
    """Value in a traced function: a node of the graph."""

    __slots__ = ("node", "trace")
    __array_priority__ = 1000

    def __init__(self, trace: Trace, node: int) -> None:
        self.trace, self.node = trace, node

    @property
    def kind(self) -> str:
        return self.trace.builder.kind(self.node)

    @property
    def dtype(self) -> Any:
        if self.kind not in self.trace.dtypes:
            refuse("a traced value has no attribute 'dtype'", SUPPORTED, AttributeError)
        return self.trace.dtypes[self.kind]

    @property
    def device(self) -> None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def ndim(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"<traced {self.trace.builder.nodes[self.node].operation}>"

    __hash__ = None  # type: ignore[assignment]  # `==` is an operation

    def __bool__(self) -> NoReturn:  # noqa: PLE0304
        refuse(
            "a score function must not branch on a traced value",
            "if, and, or, min and max decide once for all pairs. Use where(condition, a, b) of torch or numpy; "
            "&, | and ~ instead of and, or and not; minimum and maximum instead of min and max.",
            TypeError,
        )

    def _number(self, *arguments: Any) -> NoReturn:
        refuse(
            "a traced value cannot become a Python number",
            "Compute with operators and functions of torch or numpy. To read an array of NumPy or JAX at traced "
            "indices, write anyattn.captured(array)[...].",
            TypeError,
        )

    __int__ = __float__ = __index__ = __complex__ = __array__ = __len__ = __iter__ = _number

    def _assign(self, *arguments: Any) -> NoReturn:
        refuse("a score function must not write to a traced value", "Return a new value, for example by where.")

    __setitem__ = __delitem__ = _assign

    def __getitem__(self, index: Any) -> Symbol:
        if index in ((), Ellipsis):
            return self
        refuse("a traced value is a number and has no elements", "Read elements of captured arrays instead.", TypeError)

    def __array_ufunc__(self, function: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
        if method != "__call__" or keywords:
            refuse(f"numpy.{function.__name__}.{method} with {', '.join(keywords) or 'no'} keywords is not supported",
                   "Call the function on its arguments alone.")  # fmt: skip
        return call(function.__name__, arguments, {})

    def __array_function__(self, function: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        return call(function.__name__, arguments, keywords)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return call(getattr(function, "__name__", str(function)), arguments, keywords or {})

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return lambda *arguments, **keywords: call(name, (self, *arguments), keywords)
        if name.startswith("__"):
            raise AttributeError(name)
        refuse(f"a traced value has no attribute {name!r}", SUPPORTED, AttributeError)


def call(name: str, arguments: Any, keywords: Mapping[str, Any]) -> Any:
    """Return the result of a function of Python, NumPy or torch, by its name."""
    plain = name.strip("_")
    function = FUNCTIONS.get(plain)
    if function is None and name.startswith("__i") and plain[1:] in FUNCTIONS:
        function = FUNCTIONS[plain[1:]]  # __iadd__ of an array that is a number
    if name.endswith("_") and not name.startswith("_"):
        refuse(f"{name} writes to its argument", f"Use {plain} and its result.")
    if function is None:
        refuse(f"{name} is not supported in a score function", SUPPORTED)
    try:
        return function(*arguments, **keywords)
    except KindError as error:
        wanted = " or ".join(_KINDS[kind] for kind in error.accepts)
        refuse(f"{plain} takes {wanted}, got {_KINDS[error.kind]}", "Convert the value first.", TypeError)
    except TypeError:
        _check_arguments(plain, function, arguments, keywords)
        raise


def _check_arguments(name: str, function: Callable[..., Any], arguments: Any, keywords: Mapping[str, Any]) -> None:
    """Raise if a function does not take these arguments."""
    import inspect  # here, because importing the package must stay fast

    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        refuse(f"{name} with these arguments is not supported in a score function: {error}", SUPPORTED, TypeError)


def operation(name: str, *arguments: Any) -> Symbol:
    """Return the symbol of an operation on symbols, numbers and captured arrays without axes."""
    trace = next((x.trace for x in arguments if isinstance(x, Symbol)), None) or active()
    return Symbol(trace, trace.builder.apply(name, *[node_of(trace, x) for x in arguments]))


def node_of(trace: Trace, value: Any) -> int:
    """Return the node of a symbol, a number or a captured array without axes."""
    if isinstance(value, Symbol):
        if value.trace is not trace:
            refuse("a traced value must not outlive the call of its function", "Compute it inside the function.")
        return value.node
    if isinstance(value, Partial):
        return _complete(value)
    if isinstance(value, (bool, int, float, np.generic)):
        return trace.builder.constant(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if isinstance(value, np.ndarray) and value.ndim == 0:
            return trace.builder.constant(value[()])
        return _complete(Partial(value))
    refuse(f"a score function must compute with numbers and captured arrays, got {type(value).__name__}",
           "Convert the value outside the function.", TypeError)  # fmt: skip


def _complete(partial: Partial) -> int:
    return _symbol(partial).node


def _symbol(partial: Partial) -> Symbol:
    found: Symbol = read(partial, ())
    return found


class Partial:
    """Captured array with the first indices of a read. It is complete, and a number, with one index per axis."""

    __array_priority__ = 1000
    __array_ufunc__ = Symbol.__array_ufunc__
    __array_function__ = Symbol.__array_function__
    __torch_function__ = Symbol.__torch_function__

    def __init__(self, array: Any, indices: tuple[Any, ...] = ()) -> None:
        self.array, self.indices = array, indices

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the sizes of the axes that have no index yet."""
        return tuple(self.array.shape)[len(self.indices) :]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __bool__(self) -> bool:
        return bool(_symbol(self))

    def __len__(self) -> int:
        if not self.shape:
            refuse("a number has no length", "Read elements of captured arrays with axes.", TypeError)
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self))])

    def __getitem__(self, index: Any) -> Symbol | Partial:
        found: Symbol | Partial = read(self, index if isinstance(index, tuple) else (index,))
        return found


def read(partial: Partial, index: tuple[Any, ...]) -> Any:
    """Return the read of a captured array at integers and traced integers, one per axis; a Partial for fewer indices.

    Integers are counted from the start of the axis, and negative ones from its end, as in Python. Traced indices are
    counted from the start alone.
    """
    trace, array = active(), partial.array
    indices, shape = (*partial.indices, *index), tuple(array.shape)
    if len(indices) > len(shape):
        refuse(f"a captured array of shape {shape} has {len(shape)} axes, got {len(indices)} indices",
               "Pass one index per axis.", IndexError)  # fmt: skip
    if len(indices) < len(shape):
        if not index:
            refuse(f"a captured array of shape {shape} must be read with one index per axis, got {len(indices)}",
                   "Write array[b, h, q_idx, ...].", TypeError)  # fmt: skip
        return Partial(array, indices)
    nodes = tuple([_index(trace, one, size) for one, size in zip(indices, shape, strict=True)])
    number = trace.number(array)
    return Symbol(trace, trace.builder.read(number, trace.captured[number].kind, nodes))


def _index(trace: Trace, index: Any, size: int) -> int:
    if isinstance(index, slice) or index is None or index is Ellipsis:
        refuse(f"a captured array must be read at single elements, got the index {index!r}", "Pass one index per axis.")
    node = node_of(trace, index)
    if trace.builder.kind(node) != INT:
        refuse(f"an index of a captured array must be an integer, got {_KINDS[trace.builder.kind(node)]}",
               "Convert it, for example by .int().", TypeError)  # fmt: skip
    value = trace.builder.constant_value(node)
    if value is not None and not -size <= value < size:
        refuse(f"an index must be from 0 to {size - 1}, got {value}", "Read elements of the array.", IndexError)
    return node if value is None or value >= 0 else trace.builder.constant(value + size)


def _operator(name: str, *, reflected: bool = False) -> Any:
    def method(self: Any, *others: Any) -> Any:
        if others and isinstance(others[0], (str, bytes, list, tuple, dict)):
            return NotImplemented
        return call(name, (*others, self) if reflected else (self, *others), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    for _type in (Symbol, Partial):
        setattr(_type, f"__{_name}__", _operator(_name))
        setattr(_type, f"__r{_name}__", _operator(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "floor", "round"):
    for _type in (Symbol, Partial):
        setattr(_type, f"__{_name}__", _operator(_name))
