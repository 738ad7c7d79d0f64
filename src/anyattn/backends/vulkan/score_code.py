"""Code of score functions: the graph of score_mod and mask_mod becomes bodies of shader functions, as steps of SPIR-V.

`linking.py` puts the bodies into a shader. Operations that no instruction computes are functions of the library
shaders/function.comp. Sizes of captured arrays and most constants are numbers in a buffer, so that other sizes and
values do not compile again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...definition.score.derivative import differentiate
from ...definition.score.graph import BOOL, CONSTANT, FLOAT, INDICES, INT, READ, SCORE, Graph, Node, parse

SCORE_INPUTS = (SCORE, *INDICES)
# Constants that the driver's compiler should know, because operations with them are folded or become cheaper.
COMPILED = (0.0, 1.0, -1.0, 2.0, 0.5, float("inf"), float("-inf"))
CHEAPER = ("floordiv", "mod", "shl", "shr", "pow")  # with a divisor, number of bits or exponent that is compiled
PRODUCTS = {2.0: ((0, 0),), 3.0: ((0, 0), (1, 0)), 4.0: ((0, 0), (1, 1))}  # factors of powers; 0: x; n: product n
WHOLE_MASK = 0xFFFFFFFF
NEGATIVE_ZERO = 0x80000000  # Mesa's compiler replaces this constant by 0, therefore it is a number in the buffer
REMAINDER_STEPS = 32  # iterations of the loop in the library's function `remainder`, at most
LOOPS = ("modulo_float", "floor_divide_float")  # functions that call it


class Extended(NamedTuple):
    """Instruction of the set GLSL.std.450."""

    number: int


Code = int | str | Extended  # opcode, function of the library, or extended instruction


class Step(NamedTuple):
    """Instruction of a body. Operands are positions of values: parameters first, then steps; for CONSTANT, a word."""

    kind: str
    code: Code
    operands: tuple[int, ...]


class Body(NamedTuple):
    """Body of a function with this number of parameters. result: the position of the value that it returns."""

    parameters: int
    steps: tuple[Step, ...]
    result: int


class Functions(NamedTuple):
    """Code of a graph. bodies: by the names of the stubs in shaders/include/function.glsl; absent: identity, no mask.

    iterations: of all loops for one pair, at most.
    """

    bodies: tuple[tuple[str, Body], ...]
    numbers: tuple[int, ...]  # words that precede the captured arrays
    iterations: int

    def words(self, captured: Any, captured_indices: Any) -> npt.NDArray[np.uint32]:
        """Return the contents of the buffer; the arrays may be None. One word more, for reads of an empty array."""
        parts = [np.array(self.numbers, np.uint32)]
        for array, dtype in ((captured, np.float32), (captured_indices, np.int32)):
            if array is not None:
                parts.append(np.ascontiguousarray(array, dtype).view(np.uint32))
        return np.concatenate([*parts, np.zeros(1, np.uint32)])

    def count_words(self, graph: Graph) -> int:
        """Return the size of the buffer for the captured arrays of a graph."""
        return len(self.numbers) + graph.sizes(floats=True) + graph.sizes(floats=False) + 1


CONSTANT_CODE, SELECT = 43, 169
_FLOATS: dict[str, Code] = {
    **{"neg": 127, "add": 129, "sub": 131, "mul": 133, "div": 136, "lt": 184, "le": 188, "eq": 180, "ne": 183},
    **{"abs": Extended(4), "floor": Extended(8), "round": Extended(2), "sqrt": Extended(31)},
    **{"exp": "exponential", "log": "logarithm", "sin": "sine", "cos": "cosine", "tanh": "tanh_float"},
    **{"sigmoid": "sigmoid", "sign": "sign_float", "pow": "power", "min": "minimum", "max": "maximum"},
    **{"floordiv": "floor_divide_float", "mod": "modulo_float", "to_int": "truncate", "to_bool": 183},
}
_INTS: dict[str, Code] = {
    **{"neg": 126, "add": 128, "sub": 130, "mul": 132, "lt": 177, "le": 179, "eq": 170, "ne": 171},
    **{"abs": Extended(5), "sign": Extended(7), "min": Extended(39), "max": Extended(42)},
    **{"and": 199, "or": 197, "xor": 198, "shl": "shift_left", "shr": "shift_right"},
    **{"floordiv": "floor_divide", "mod": "modulo", "to_float": 111, "to_bool": 171},
}
_BOOLS: dict[str, Code] = {"and": 167, "or": 166, "xor": 165, "eq": 164, "ne": 165, "not": 168}
_CODES = {FLOAT: _FLOATS, INT: _INTS, BOOL: _BOOLS}
ARITHMETIC = (127, 129, 131, 133, 136)  # floating-point operations that a driver might contract


@lru_cache(256)
def generate(text: str) -> Functions:
    """Return the code of a graph's text."""
    graph = parse(text)
    source = _Source(graph)
    bodies = {}
    if graph.mask is not None:
        bodies["mask_mod"] = source.body(graph, graph.mask, INDICES)
    if graph.score is not None:
        derivative = differentiate(graph)
        bodies["score_mod"] = source.body(graph, graph.score, SCORE_INPUTS)
        bodies["score_slope"] = source.body(derivative.graph, derivative.slope, SCORE_INPUTS)
    loops = {name: sum(step.code in LOOPS for step in body.steps) for name, body in bodies.items()}
    iterations = (sum(loops.values()) + loops.get("mask_mod", 0)) * REMAINDER_STEPS  # shaders call mask_mod twice
    return Functions(tuple(bodies.items()), source.finished_numbers(), iterations)


class _Array(NamedTuple):
    """Positions of the numbers of a captured array: its first element among all, its elements, and its sizes."""

    start: int
    size: int
    sizes: tuple[int, ...]


class _Source:
    """Bodies of one graph in the making. They share the numbers."""

    def __init__(self, graph: Graph) -> None:
        self.numbers: list[int] = []
        self.arrays: list[_Array] = []
        self._positions: dict[int, int] = {}
        starts = {True: 0, False: graph.sizes(floats=True)}
        for one in graph.arrays:
            floats = one.kind == FLOAT
            start, size, *sizes = [self._new(x) for x in (starts[floats], one.size, *one.shape)]
            self.arrays.append(_Array(start, size, tuple(sizes)))
            starts[floats] += one.size

    def _new(self, word: int) -> int:
        """Return the position of a new number. Equal sizes have their own, because they may differ in another call."""
        self.numbers.append(word)
        return len(self.numbers) - 1

    def number(self, word: int) -> int:
        """Return the position of a constant."""
        if word not in self._positions:
            self._positions[word] = self._new(word)
        return self._positions[word]

    def finished_numbers(self) -> tuple[int, ...]:
        """Return all numbers. The arrays start after them."""
        for array in self.arrays:
            self.numbers[array.start] += len(self.numbers)
        return tuple(self.numbers)

    def body(self, graph: Graph, wanted: int, inputs: Sequence[str]) -> Body:
        """Return the body that computes a node from these inputs."""
        writer = _Writer(self, graph, inputs)
        for number in graph.reachable((wanted,)):
            writer.values[number] = writer.node(number)
        return Body(len(inputs), tuple(writer.steps), writer.values[wanted])


class _Writer:
    """Steps of one body, in order. Methods return positions of values."""

    def __init__(self, source: _Source, graph: Graph, inputs: Sequence[str]) -> None:
        self.source, self.graph, self.inputs = source, graph, tuple(inputs)
        self.steps: list[Step] = []
        self.values: dict[int, int] = {}  # node -> position
        self._known: dict[Step, int] = {}
        self._compiled = {node.arguments[1] for node in graph.nodes if node.operation in CHEAPER}

    def add(self, kind: str, code: Code, *operands: int) -> int:
        step = Step(kind, code, operands)
        if step not in self._known:
            self.steps.append(step)
            self._known[step] = len(self.inputs) + len(self.steps) - 1
        return self._known[step]

    def constant(self, kind: str, value: float) -> int:
        return self.add(kind, CONSTANT_CODE, word_of(kind, value))

    def stored(self, kind: str, position: int) -> int:
        """Return a number of the buffer."""
        return self.add(kind, "read_float" if kind == FLOAT else "read_int", self.constant(INT, position))

    def node(self, number: int) -> int:
        node = self.graph.nodes[number]
        if node.operation in self.inputs:
            return self.inputs.index(node.operation)
        if node.operation == CONSTANT:
            value: float = node.value  # type: ignore[assignment]
            if node.kind == BOOL or number in self._compiled or (node.kind == FLOAT and value in COMPILED):
                return self.constant(node.kind, value)
            return self.stored(node.kind, self.source.number(word_of(node.kind, value)))
        if node.operation == READ:
            return self._read(node)
        return self._operation(node, [self.values[one] for one in node.arguments])

    def _operation(self, node: Node, operands: list[int]) -> int:
        name, kind = node.operation, self.graph.nodes[node.arguments[-1]].kind
        if name == "where":
            return self.add(node.kind, SELECT, *operands)
        if name == "neg" and self._constant_value(node.arguments[0]) == 0:
            return self.stored(FLOAT, self.source.number(NEGATIVE_ZERO))
        if name == "pow":
            return self._power(operands, self._constant_value(node.arguments[1]))
        if kind == BOOL and name in ("to_float", "to_int"):
            return self.add(node.kind, SELECT, *operands, self.constant(node.kind, 1), self.constant(node.kind, 0))
        if name == "to_bool":
            operands.append(self.constant(kind, 0))
        return self.add(node.kind, _CODES[kind][name], *operands)

    def _constant_value(self, number: int) -> float | None:
        node = self.graph.nodes[number]
        return node.value if node.operation == CONSTANT else None

    def _power(self, operands: list[int], exponent: float | None) -> int:
        x = operands[0]
        if exponent == -1:
            return self.add(FLOAT, _FLOATS["div"], self.constant(FLOAT, 1), x)
        if exponent is None or exponent not in PRODUCTS:
            return self.add(FLOAT, _FLOATS["pow"], *operands)
        found = [x]
        for a, b in PRODUCTS[exponent]:
            found.append(self.add(FLOAT, _FLOATS["mul"], found[a], found[b]))
        return found[-1]

    def _read(self, node: Node) -> int:
        array = self.source.arrays[int(node.value or 0)]
        index = self.constant(INT, 0)
        for axis, argument in enumerate(node.arguments):
            if axis:
                index = self.add(INT, _INTS["mul"], index, self.stored(INT, array.sizes[axis]))
                index = self.add(INT, _INTS["add"], index, self.values[argument])
            else:
                index = self.values[argument]
        place = self.add(INT, "place", self.stored(INT, array.start), self.stored(INT, array.size), index)
        if node.kind == FLOAT:
            return self.add(FLOAT, "read_float", place)
        found = self.add(INT, "read_int", place)
        return found if node.kind == INT else self.add(BOOL, _INTS["ne"], found, self.constant(INT, 0))


def word_of(kind: str, value: float) -> int:
    """Return a constant as a word."""
    if kind == FLOAT:
        with np.errstate(over="ignore"):
            return int(np.float32(value).view(np.uint32))
    return int(value) & WHOLE_MASK
