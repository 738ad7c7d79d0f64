"""Source text of score functions: the graph of score_mod and mask_mod becomes functions of Triton.

Each function takes the score (except mask_mod), b, h, q_idx, kv_idx and `scalars` (views.Scalars), whose fields hold
the captured arrays. Sizes of captured arrays and most constants are numbers at run time, fields n0, n1, ... of
`scalars`, so that other sizes and values do not compile again. Functions are compiled once per text.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from ...definition.score.derivative import Derivative, differentiate
from ...definition.score.graph import CONSTANT, FLOAT, INDICES, INT, READ, SCORE, Graph, Node
from . import captured, score_math, tiles
from .launch import Number, f32, i32

# Constants that the compiler should know, because operations with them are folded or become cheaper.
COMPILED = (0.0, 1.0, -1.0, 2.0, 0.5, float("inf"), float("-inf"))
PARAMETERS = "b, h, q_idx, kv_idx, scalars"
RESULT = "tl.broadcast_to(v{0}, t.shape)"
PRODUCTS = {2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", 4.0: "({0} * {0}) * ({0} * {0})", -1.0: "1.0 / {0}"}  # powers

_COMMON = {
    **{name: f"tl.{name}({{0}})" for name in ("abs", "floor", "exp", "log", "sin", "cos")},
    **{"neg": "-{0}", "sqrt": "tl.sqrt_rn({0})", "tanh": "tanh({0})", "sigmoid": "sigmoid({0})"},
    **{"round": "round_even({0})", "not": "{0} == 0", "where": "tl.where({0}, {1}, {2})", "to_bool": "{0} != 0"},
    **{
        name: f"{{0}} {sign} {{1}}"
        for name, sign in (
            *(("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/"), ("lt", "<"), ("le", "<="), ("eq", "==")),
            *(("ne", "!="), ("and", "&"), ("or", "|"), ("xor", "^"), ("shl", "<<"), ("shr", ">>")),
        )
    },
    "to_float": "{0}.to(tl.float32)",
}
_FLOATS = {
    "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    **{"sign": "sign({0})", "floordiv": "floor_divide_float({0}, {1})", "mod": "modulo_float({0}, {1})"},
    **{"pow": "power({0}, {1})", "to_int": "truncate({0})"},
}
_INTS = {
    **{"min": "tl.minimum({0}, {1})", "max": "tl.maximum({0}, {1})", "sign": "sign_int({0})"},
    **{"floordiv": "floor_divide({0}, {1})", "mod": "modulo({0}, {1})", "to_int": "{0}.to(tl.int32)"},
}


class Functions(NamedTuple):
    """Functions of a graph for Triton, and the numbers that they read.

    score, mask: score_mod and mask_mod; slope: the derivative of score_mod by the score. None: absent; for slope, 1.
    terms: the function that adds the terms of the gradients of captured arrays (captured.py), for these reads.
    """

    score: Any
    slope: Any
    mask: Any
    terms: Any
    reads: tuple[Read, ...]
    numbers: tuple[Number, ...]


class Read(NamedTuple):
    """Read of a captured array with a gradient, and whether its index depends on the query and on the key."""

    by_query: bool
    by_key: bool


@lru_cache(256)
def generate(graph: Graph) -> Functions:
    """Return the functions of a graph."""
    source = _Source(graph)
    score = mask = slope = terms = None
    reads: tuple[Read, ...] = ()
    if graph.mask is not None:
        mask = source.function("mask_mod", PARAMETERS, graph, graph.mask, "v{0}")
    if graph.score is not None:
        score = source.function("score_mod", f"t, {PARAMETERS}", graph, graph.score, RESULT)
        derivative = differentiate(graph)
        slope = _slope(source, derivative)
        terms, reads = _terms(source, derivative)
    return Functions(score, slope, mask, terms, reads, tuple(source.numbers))


def _slope(source: _Source, derivative: Derivative) -> Any:
    graph, number = derivative.graph, derivative.slope
    if graph.nodes[number].operation == CONSTANT and graph.nodes[number].value == 1.0:
        return None
    return source.function("slope", f"t, {PARAMETERS}", graph, number, RESULT)


def _terms(source: _Source, derivative: Derivative) -> tuple[Any, tuple[Read, ...]]:
    """Return the function that adds the terms of all reads, and these reads."""
    graph, calls, reads = derivative.graph, [], []
    for number, adjoint in derivative.reads:
        node = graph.nodes[number]
        names = {graph.nodes[one].operation for one in graph.reachable(node.arguments)}
        read = Read("q_idx" in names, "kv_idx" in names)
        array, flat = source.arrays[int(node.value or 0)], source.flat_index(graph, node)
        place = f"place({flat}, {array.start}, {array.size})"
        sums = f"{int(node.value or 0)}, sums, {read.by_query}, {read.by_key}, MEASURE"
        calls.append(f"add_terms(chain(ds, v{adjoint}), {place}, {sums})")
        reads.append(read)
    wanted = {*derivative.indices, *(adjoint for _, adjoint in derivative.reads)}
    parameters = f"ds, t, {PARAMETERS}, sums, MEASURE: tl.constexpr"
    lines = source.lines(graph, sorted(wanted))
    return compile_function("terms", parameters, [*lines, *calls]) if reads else None, tuple(reads)


class _Array(NamedTuple):
    """Text of the numbers of a captured array: its first element among all, its elements, and its sizes."""

    start: str
    size: str
    sizes: tuple[str, ...]


class _Source:
    """Functions of one graph in the making. They share the numbers."""

    def __init__(self, graph: Graph) -> None:
        self.numbers: list[Number] = []
        self._names: dict[Number, str] = {}
        self.arrays: list[_Array] = []
        starts = {True: 0, False: 0}
        for one in graph.arrays:
            floats = one.kind == FLOAT
            sizes = tuple([self._position(size) for size in one.shape])
            self.arrays.append(_Array(self._position(starts[floats]), self._position(one.size), sizes))
            starts[floats] += one.size

    def _position(self, value: int) -> str:
        """Return the text of a size. Each has its own number, because equal sizes may differ in another call."""
        self.numbers.append(i32(value))
        return f"scalars.n{len(self.numbers) - 1}"

    def _constant(self, number: Number) -> str:
        if number not in self._names:
            self.numbers.append(number)
            self._names[number] = f"scalars.n{len(self.numbers) - 1}"
        return self._names[number]

    def function(self, name: str, parameters: str, graph: Graph, wanted: int, result: str) -> Any:
        """Return the compiled function. result: text of what it returns, from the name of the wanted node's value."""
        return compile_function(name, parameters, [*self.lines(graph, (wanted,)), f"return {result.format(wanted)}"])

    def lines(self, graph: Graph, wanted: Sequence[int]) -> list[str]:
        """Return the statements that compute the wanted nodes: node n becomes variable vn."""
        known = self._known_constants(graph)
        return [f"v{n} = {self._text(graph, n, known)}" for n in graph.reachable(wanted)]

    def _known_constants(self, graph: Graph) -> set[int]:
        """Return the constants that the compiler should know: divisors, numbers of bits, exponents, and COMPILED."""
        found = {n for n, one in enumerate(graph.nodes) if one.operation == CONSTANT and one.value in COMPILED}
        for node in graph.nodes:
            if node.operation in ("floordiv", "mod", "shl", "shr", "pow"):
                found.add(node.arguments[1])
        return found

    def _text(self, graph: Graph, number: int, known: set[int]) -> str:
        """Return the expression of a node."""
        node = graph.nodes[number]
        operands = [f"v{one}" for one in node.arguments]
        if node.operation == CONSTANT:
            value = f"spread({self._value(node, compiled=number in known)}, q_idx)"
            return value if node.kind in (FLOAT, INT) else f"{value} != 0"
        if node.operation == SCORE:
            return "t"
        if node.operation in INDICES:
            return node.operation if node.operation.endswith("_idx") else f"spread({node.operation}, q_idx)"
        if node.operation == READ:
            array = self.arrays[int(node.value or 0)]
            table = "captured" if node.kind == FLOAT else "captured_indices"
            text = f"read(scalars.{table} + {array.start}, {self.flat_index(graph, node)}, {array.size})"
            return f"{text} != 0" if node.kind not in (FLOAT, INT) else text
        kind = graph.nodes[node.arguments[-1]].kind
        if node.operation == "pow":
            template = PRODUCTS.get(_constant_value(graph, node.arguments[1]), _FLOATS["pow"])
        else:
            template = (_FLOATS if kind == FLOAT else _INTS).get(node.operation) or _COMMON[node.operation]
        return template.format(*operands)

    def _value(self, node: Node, *, compiled: bool) -> str:
        if node.kind == FLOAT:
            value = float(np.float32(node.value))
            if compiled or value != value:  # noqa: PLR0124 (NaN)
                return f'tl.full([], float("{value}"), tl.float32)'
            return self._constant(f32(value))
        value = int(node.value or 0)
        return f"tl.full([], {value}, tl.int32)" if compiled else self._constant(i32(value))

    def flat_index(self, graph: Graph, node: Node) -> str:
        """Return the expression of the index of a read in the flat array."""
        if not node.arguments:
            return "spread(tl.full([], 0, tl.int32), q_idx)"
        sizes = self.arrays[int(node.value or 0)].sizes
        text = f"v{node.arguments[0]}"
        for argument, size in zip(node.arguments[1:], sizes[1:], strict=True):
            text = f"({text} * {size} + v{argument})"
        return text


def _constant_value(graph: Graph, number: int) -> Any:
    node = graph.nodes[number]
    return node.value if node.operation == CONSTANT else None


def compile_function(name: str, parameters: str, lines: Sequence[str]) -> Any:
    """Return a function of Triton."""
    return _compile(name, "\n    ".join([f"def {name}({parameters}):", *lines]) + "\n")


@lru_cache(1024)
def _compile(name: str, text: str) -> Any:
    """Return the function of a text. inspect, with which Triton reads its source, finds it in linecache."""
    file = f"<anyattn {name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names: dict[str, Any] = {"__name__": __name__, "tl": tl, "tanh": tiles.tanh, "add_terms": captured.add_terms}
    names |= {one: getattr(score_math, one) for one in score_math.FUNCTIONS}
    exec(compile(text, file, "exec"), names)  # a text of names, numbers and operations only
    return triton.jit(names[name])
