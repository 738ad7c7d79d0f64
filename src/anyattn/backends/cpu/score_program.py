"""Score programs of the CPU engine: the graph of score_mod and mask_mod as instructions on registers.

The library reads them (score_program.h). A value that does not depend on the query and the key of a pair is computed
before the pairs: once for a tile, for its queries or for its keys. A register that pairs read holds a number for each
of them, so such values are spread first.
"""

from __future__ import annotations

import struct
from array import array as words_of
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from ...definition.problem import Problem
from ...definition.score.builder import Builder
from ...definition.score.derivative import differentiate
from ...definition.score.graph import BOOL, CONSTANT, FLOAT, INDICES, INT, READ, SCORE, Graph, Node

VERSION = 1
MOST_REGISTERS = 256
OPERATIONS = (
    *("const_f", "const_i", "b", "h", "q_idx", "kv_idx", "spread_once", "spread_lanes", "spread_keys"),
    *("read_f", "read_i", "read_b", "where", "and", "or", "xor", "not"),
    *("i_to_f", "b_to_f", "f_to_i", "b_to_i", "f_to_b", "i_to_b"),
    *("neg_f", "abs_f", "sign_f", "floor_f", "round_f", "exp_f", "log_f", "sqrt_f", "tanh_f", "sigmoid_f", "sin_f"),
    *("cos_f", "add_f", "sub_f", "mul_f", "div_f", "pow_f", "floordiv_f", "mod_f", "min_f", "max_f"),
    *("lt_f", "le_f", "eq_f", "ne_f"),
    *("neg_i", "abs_i", "sign_i", "add_i", "sub_i", "mul_i", "floordiv_i", "mod_i", "min_i", "max_i"),
    *("lt_i", "le_i", "eq_i", "ne_i", "shl_i", "shr_i"),
)  # as the rows of score_operations.def
_NUMBERS = {name: number for number, name in enumerate(OPERATIONS)}
_SAME_BITS = ("where", "and", "or", "xor", "not")  # operations that do not depend on the kind of their operands
ONCE, LANES, KEYS, SETUP, PAIRS = range(5)  # stages; a value of LANES and KEYS is one of PAIRS
_STAGES = {"b": ONCE, "h": LANES, "q_idx": LANES, "kv_idx": KEYS, SCORE: PAIRS}
_T = 0  # the register of the score


class TooLarge(ValueError):
    """Function that needs more registers than there are."""


class Instruction(NamedTuple):
    """Operation, stage, and virtual registers: the result and the operands. `words`: other operands."""

    operation: str
    stage: int
    to: int
    operands: tuple[int, ...] = ()
    words: tuple[int, ...] = ()


class Section:
    """Instructions that compute some nodes of a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._code: list[list[Instruction]] = [[] for _ in range(5)]
        self._registers: dict[tuple[int, int], int] = {}  # (node, stage of the reader): virtual register
        self._count = 1
        self.stages: dict[int, int] = {}

    def add(self, nodes: Iterable[int]) -> None:
        """Add the instructions of nodes and of all nodes that they depend on."""
        for number in self._graph.reachable(nodes):
            self._add(number, self._graph.nodes[number])

    def pairs(self, number: int) -> int:
        """Return the virtual register that holds a node for every pair."""
        return self._read(number, PAIRS)

    def own(self, number: int) -> int:
        """Return the virtual register that holds a node in its own stage."""
        return self._registers[number, self.stages[number]]

    def _add(self, number: int, node: Node) -> None:
        stage = ONCE if node.operation == CONSTANT else _STAGES.get(node.operation, ONCE)
        for argument in node.arguments:
            stage = _join(stage, self.stages[argument])
        self.stages[number] = stage
        if node.operation == SCORE:
            self._registers[number, PAIRS] = _T
            return
        operands = tuple([self._read(argument, stage) for argument in node.arguments])
        kind = node.kind if node.operation == READ else self._kind_of_operands(node)
        name, words = _instruction(node, kind)
        self._registers[number, stage] = self._emit(name, stage, operands, words)

    def _kind_of_operands(self, node: Node) -> str:
        return self._graph.nodes[node.arguments[-1]].kind if node.arguments else node.kind

    def _read(self, number: int, stage: int) -> int:
        """Return the register of a node that instructions of a stage read."""
        found = self._registers.get((number, stage))
        if found is None:
            source = self.stages[number]
            name = {ONCE: "spread_once", LANES: "spread_lanes", KEYS: "spread_keys"}[source]
            where = SETUP if stage == PAIRS and source != KEYS else stage
            found = self._registers[number, stage] = self._emit(name, where, (self._registers[number, source],))
        return found

    def _emit(self, name: str, stage: int, operands: tuple[int, ...], words: tuple[int, ...] = ()) -> int:
        to, self._count = self._count, self._count + 1
        self._code[stage].append(Instruction(name, stage, to, operands, words))
        return to

    def words(self, results: Sequence[int], terms: Sequence[tuple[int, int, int, int]] = ()) -> list[int]:
        """Return the section as words.

        Args:
            results: virtual registers of score, mask and slope; -1: none.
            terms: (array, virtual register of the adjoint or -1, virtual register of the index, stage of the index).
        """
        code = [one for stage in self._code for one in stage]
        kept = {*results, *(one for term in terms for one in term[1:3])}
        place = _allocate(code, kept)
        count = 1 + max(place.values())
        if count > MOST_REGISTERS:
            raise TooLarge(f"needs {count} values at a time in a score function, of at most {MOST_REGISTERS}")
        reads_score = any(_T in one.operands for one in code) or _T in kept
        found = [count, *(place[one] for one in results), int(reads_score), len(terms)]
        found += [len(stage) for stage in self._code]
        for one in code:
            operands = (*(place[x] for x in one.operands), *one.words, 0, 0, 0)[:3]
            found += [_NUMBERS[one.operation], place[one.to], *operands]
        for number, adjoint, index, stage in terms:
            found += [number, place[adjoint], place[index], stage]
        return found


def _join(a: int, b: int) -> int:
    """Return the stage of a value that depends on values of two stages."""
    if a == b or ONCE in (a, b):
        return max(a, b)
    return PAIRS


def _instruction(node: Node, kind: str) -> tuple[str, tuple[int, ...]]:
    """Return the operation of a node whose operands are of this kind, and the operands that are no registers."""
    name = node.operation
    if name == CONSTANT:
        if node.kind == FLOAT:
            return "const_f", struct.unpack("<2i", struct.pack("<d", node.value))
        value = int(node.value or 0)
        return "const_i", (-value if node.kind == BOOL else value,)
    if name == READ:
        return f"read_{kind}", (int(node.value or 0),)
    if name in INDICES or name in _SAME_BITS:
        return name, ()
    if name.startswith("to_"):
        return f"{kind}_{name}"[: len("x_to_x")], ()
    return f"{name}_{FLOAT if kind == FLOAT else INT}", ()


def _allocate(code: Sequence[Instruction], kept: set[int]) -> dict[int, int]:
    """Return the register of every virtual register. A register is used again after the last read of its value.

    Instructions of pairs run many times, so what they read from earlier stages stays.
    """
    end = len(code)
    first_of_pairs = next((i for i, one in enumerate(code) if one.stage == PAIRS), end)
    last = {one.to: i for i, one in enumerate(code)}
    made = dict(last)
    for i, one in enumerate(code):
        for operand in one.operands:
            if operand != _T:
                last[operand] = end if i >= first_of_pairs > made[operand] else i
    last |= dict.fromkeys(kept - {-1, _T}, end)
    place, count = {_T: _T, -1: -1}, 1
    free: list[int] = []
    ends: dict[int, list[int]] = {}
    for register, i in last.items():
        ends.setdefault(i, []).append(register)
    for i, instruction in enumerate(code):
        if not free:
            free.append(count)
            count += 1
        place[instruction.to] = free.pop()
        free += [place[register] for register in ends.get(i, ())]
    return place


def limits(problem: Problem) -> list[str]:
    """Return why the engine does not support the functions of a problem, or []."""
    if not problem.score:
        return []
    graph = problem.functions
    if max(problem.seqlen_q, problem.seqlen_k, *(array.size for array in graph.arrays), 0) >= 2**31:
        return ["counts queries, keys and elements of captured arrays in score functions up to 2^31 - 1"]
    try:
        lower(graph)
    except TooLarge as error:
        return [str(error)]
    return []


@lru_cache(256)
def lower(graph: Graph) -> words_of[int]:
    """Return the program of a graph: its arrays, and the sections for the forward pass, the slope and the gradients.

    Raises:
        TooLarge: the functions need too many registers.
    """
    found = [VERSION, len(graph.arrays)]
    starts = {True: 0, False: 0}
    for one in graph.arrays:
        floats = one.kind == FLOAT
        found += [0 if floats else 1, starts[floats], one.size]
        starts[floats] += one.size
    found += _results(graph, None)
    if graph.score is None:
        found += _results(graph, None) + Section(graph).words((-1, -1, -1))
        return words_of("i", found)
    derivative = differentiate(graph)
    found += _results(derivative.graph, derivative.slope) + _gradients(derivative.graph, derivative.reads)
    return words_of("i", found)


def _results(graph: Graph, slope: int | None) -> list[int]:
    """Return the section that computes score, mask and, if it is not None, the slope of a graph."""
    wanted = [graph.score, graph.mask, None if slope is None or _is_one(graph, slope) else slope]
    simple, moved = _simplify(graph, [one for one in wanted if one is not None])
    section = Section(simple)
    section.add(moved.values())
    return section.words([-1 if one is None else section.pairs(moved[one]) for one in wanted])


def _gradients(graph: Graph, reads: Sequence[tuple[int, int]]) -> list[int]:
    """Return the section of the gradients of captured arrays. reads: reads and the derivative by each."""
    simple, moved = _simplify(graph, [one for read in reads for one in read])
    section = Section(simple)
    indices = [simple.nodes[moved[read]].arguments[0] for read, _ in reads]
    adjoints = [None if _is_one(graph, adjoint) else moved[adjoint] for _, adjoint in reads]
    section.add([*indices, *(one for one in adjoints if one is not None)])
    terms = []
    for (read, _), index, adjoint in zip(reads, indices, adjoints, strict=True):
        register = -1 if adjoint is None else section.pairs(adjoint)
        number = int(graph.nodes[read].value or 0)
        terms.append((number, register, section.own(index), section.stages[index]))
    return section.words((-1, -1, -1), terms)


def _is_one(graph: Graph, number: int) -> bool:
    node = graph.nodes[number]
    return node.operation == CONSTANT and node.value == 1.0


def _simplify(graph: Graph, wanted: Sequence[int]) -> tuple[Graph, dict[int, int]]:
    """Return a graph whose reads have one index, in the flat array, and the places of the wanted nodes in it.

    Division and remainder of integers by a power of two become a shift and a bitwise and.
    """
    build = Builder()
    place: dict[int, int] = {}
    for number in graph.reachable(wanted):
        node = graph.nodes[number]
        arguments = tuple([place[one] for one in node.arguments])
        if node.operation == READ:
            flat = _flat_index(build, graph.arrays[int(node.value or 0)].shape, arguments)
            place[number] = build.read(int(node.value or 0), node.kind, (flat,))
        else:
            place[number] = _divided(build, node, arguments)
    simple = Graph(tuple(build.nodes), None, None, graph.arrays)
    return simple, {one: place[one] for one in wanted}


def _flat_index(build: Builder, shape: Sequence[int], indices: Sequence[int]) -> int:
    flat = build.constant(0)
    for index, size in zip(indices, shape, strict=True):
        flat = build.apply("add", build.apply("mul", flat, build.constant(size)), index)
    return flat


def _divided(build: Builder, node: Node, arguments: tuple[int, ...]) -> int:
    if node.operation in ("floordiv", "mod") and node.kind == INT:
        divisor = build.constant_value(arguments[1])
        if divisor and divisor > 0 and divisor & (divisor - 1) == 0:
            if node.operation == "mod":
                return build.apply("and", arguments[0], build.constant(divisor - 1))
            return build.apply("shr", arguments[0], build.constant(divisor.bit_length() - 1))
    return build.add(node._replace(arguments=arguments))
