"""Functions that need no new tracing, because an earlier call has shown their graph.

These are expressions. Their bytecode loads arguments, constants and variables, and applies operators. It has no call,
no attribute, no branch and no assignment but to local variables. So their graph depends on nothing but their code, the
numbers among their variables, and the metadata of the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from .graph import Graph
from .trace import Function, Traced

# Of Python 3.10 to 3.14. A function with any other instruction is traced at every call.
INSTRUCTIONS = frozenset((
    *("RESUME", "NOP", "COPY_FREE_VARS", "RETURN_VALUE", "BUILD_TUPLE", "COMPARE_OP", "UNARY_NEGATIVE", "UNARY_INVERT"),
    *("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_FAST", "LOAD_FAST_BORROW", "STORE_FAST"),
    *("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW", "STORE_FAST_LOAD_FAST"),
    *("BINARY_OP", "BINARY_SUBSCR", "BINARY_ADD", "BINARY_SUBTRACT", "BINARY_MULTIPLY", "BINARY_TRUE_DIVIDE"),
    *("BINARY_FLOOR_DIVIDE", "BINARY_MODULO", "BINARY_POWER", "BINARY_AND", "BINARY_OR", "BINARY_XOR"),
    *("BINARY_LSHIFT", "BINARY_RSHIFT"),
))  # fmt: skip
LARGEST = 1024  # graphs that are kept
VARIADIC = 0x04 | 0x08  # flags of code with *args or **kwargs


class Known(NamedTuple):
    """Graph, and the variable that is each captured array."""

    graph: Graph
    places: tuple[int, ...]


_known: dict[Hashable, Known] = {}


def trace_once(
    functions: tuple[Function | None, ...],
    describe: Callable[[Any], Hashable],
    trace: Callable[..., Traced],
) -> Traced:
    """Return trace(*functions), from an earlier call if the functions are expressions.

    describe: returns the metadata of an array on which the graph depends; None for a value that is no such array.
    """
    found = _variables(functions, describe)
    if found is None:
        return trace(*functions)
    key, variables = found
    known = _known.get(key)
    if known is None:
        traced = trace(*functions)
        places = [next((n for n, x in enumerate(variables) if x is array), None) for array in traced.arrays]
        if None not in places:  # else an operator computed an array from others
            if len(_known) >= LARGEST:
                _known.clear()
            _known[key] = Known(traced.graph, tuple(n for n in places if n is not None))
        return traced
    return Traced(known.graph, tuple([variables[n] for n in known.places]))


def _variables(
    functions: tuple[Function | None, ...], describe: Callable[[Any], Hashable]
) -> tuple[Hashable, list[Any]] | None:
    """Return what the graph of expressions depends on, and their variables; None for other functions."""
    key: list[Hashable] = []
    variables: list[Any] = []
    for function in functions:
        if function is None:
            key.append(None)
            continue
        names = _global_names(function.__code__) if type(function) is FunctionType else None
        if names is None:
            return None
        key.append(function.__code__)
        try:
            variables += function.__defaults__ or ()
            variables += [cell.cell_contents for cell in function.__closure__ or ()]
            variables += [function.__globals__[name] for name in names]
        except (ValueError, KeyError):  # an empty cell, a built-in or an unknown name
            return None
    for x in variables:
        is_number = type(x) in (int, float, bool)
        metadata = (type(x), repr(x)) if is_number else describe(x)  # repr: 0.0 and -0.0 differ
        if metadata is None:
            return None
        key += [metadata, None if is_number else next(m for m, y in enumerate(variables) if y is x)]
    return tuple(key), variables


@lru_cache(LARGEST)
def _global_names(code: CodeType) -> tuple[str, ...] | None:
    """Return the global variables that the code of an expression reads; None for other code."""
    import dis  # here, because importing the package must stay fast

    if code.co_kwonlyargcount or code.co_flags & VARIADIC:
        return None
    names: dict[str, None] = {}
    for one in dis.get_instructions(code):
        changes = one.opname == "BINARY_OP" and one.argrepr.endswith("=")  # x += 1 writes to an array
        if one.opname not in INSTRUCTIONS or changes:
            return None
        if one.opname == "LOAD_GLOBAL":
            names[one.argval] = None
    return tuple(names)
