"""Tracing: the graph of a score function and a mask function, and the arrays that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from .graph import BOOL, FLOAT, INDICES, INT, SCORE, Graph, Node
from .names import TABLE
from .symbol import FUNCTIONS, Partial, Symbol, Trace, current, node_of

Function = Callable[..., Any]
PARAMETERS = {"score_mod": (SCORE, *INDICES), "mask_mod": INDICES}
FUNCTIONS.update(TABLE)


class Traced(NamedTuple):
    """Graph of the functions of a call, and the captured arrays in the order of `graph.arrays`."""

    graph: Graph
    arrays: tuple[Any, ...]


def captured(array: Any) -> Any:
    """Return the array in a form that a score function can read at traced indices.

    torch tensors need no wrapper: `bias[h, q_idx]` works on them. NumPy and JAX refuse such an index, so their arrays
    are wrapped once, outside the function.

    >>> import numpy as np, anyattn
    >>> slopes = anyattn.captured(np.array([0.5, 0.25], np.float32))
    >>> def alibi(score, b, h, q_idx, kv_idx):
    ...     return score - slopes[h] * abs(q_idx - kv_idx)
    >>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
    >>> anyattn.attention(q, k, v, score_mod=alibi).shape
    (1, 4, 2, 8)
    """
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(f"array must be a NumPy array, a torch tensor or a JAX array, got {type(array).__name__}.")
    return Partial(array)


def trace(
    score_mod: Function | None,
    mask_mod: Function | None,
    context: Callable[[Trace], AbstractContextManager[Any]] = lambda _: nullcontext(),
    dtypes: Mapping[str, Any] | None = None,
) -> Traced:
    """Return the graph of score_mod(score, b, h, q_idx, kv_idx) and mask_mod(b, h, q_idx, kv_idx).

    Each function is called once with symbols. context: entered during the calls. dtypes: see Trace;
    None: those of NumPy, with float32.

    Raises:
        TypeError, NotImplementedError: the function does something that cannot be traced; the message names it, its
            line and the remedy.
    """
    recording = Trace(numpy_dtypes("float32") if dtypes is None else dtypes)
    build = recording.builder
    indices = [Symbol(recording, build.add(Node(name, INT))) for name in INDICES]
    score = mask = None
    token = current.set(recording)
    try:
        with context(recording):
            if score_mod is not None:
                _check(score_mod, "score_mod")
                given = (Symbol(recording, build.add(Node(SCORE, FLOAT))), *indices)
                score = _result("score_mod", recording, score_mod(*given), FLOAT)
            if mask_mod is not None:
                _check(mask_mod, "mask_mod")
                mask = _result("mask_mod", recording, mask_mod(*indices), BOOL)
    finally:
        current.reset(token)
    return Traced(build.graph(score, mask, tuple(recording.captured)), tuple(recording.arrays))


def numpy_dtypes(compute: str) -> dict[str, Any]:
    """Return NumPy's dtype of each kind of values. compute: of floating-point values."""
    return {FLOAT: np.dtype(compute), INT: np.dtype(np.int32), BOOL: np.dtype(bool)}


def _check(function: Any, name: str) -> None:
    if not callable(function):
        raise TypeError(f"{name} must be a function or None, got {type(function).__name__}.")
    code = getattr(function, "__code__", None)
    if code is not None and (code.co_argcount, code.co_kwonlyargcount) == (len(PARAMETERS[name]), 0):
        return  # most common
    import inspect  # here, because importing the package must stay fast

    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in function
        return
    try:
        signature.bind(*PARAMETERS[name])
    except TypeError as error:
        raise TypeError(
            f"{name} must be a function of ({', '.join(PARAMETERS[name])}), got one of {signature}: {error}."
        ) from None


def _result(name: str, recording: Trace, found: Any, kind: str) -> int:
    """Return the node of a function's result."""
    expected = "a number" if kind == FLOAT else "a boolean"
    shape = getattr(found, "shape", ())
    if found is None or isinstance(found, (tuple, list, str)) or tuple(shape):
        given = f"an array of shape {tuple(shape)}" if shape else type(found).__name__
        raise TypeError(f"{name} must return {expected} for each pair, got {given}. Return an elementwise result.")
    node = node_of(recording, found)
    returned = recording.builder.kind(node)
    if (kind == BOOL) != (returned == BOOL):
        given = {FLOAT: "a floating-point number", INT: "an integer", BOOL: "a boolean"}[returned]
        raise TypeError(f"{name} must return {expected} for each pair, got {given}. Convert the result.")
    return recording.builder.cast(node, kind)
