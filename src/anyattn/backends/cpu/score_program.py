"""Score programs of the CPU engine: the graph of score_mod and mask_mod as instructions on registers.

The library reads them (score_program.h). A value that does not depend on the query and the key of a pair is computed
before the pairs: once for a tile, for its queries or for its keys. Instructions of pairs read such a value in its form.
"""

from __future__ import annotations

import struct
from array import array as words_of
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from ...definition.passes import SECOND
from ...definition.problem import Problem
from ...definition.score.derivative import differentiate
from ...definition.score.evaluate import slope_of
from ...definition.score.graph import BOOL, CONSTANT, FLOAT, INDICES, INT, READ, SCORE, Graph, Node
from .score_simplify import KEYS, LANES, ONCE, PAIRS, simplify, stage_of

VERSION = 3
MOST_REGISTERS = 256
OPERATIONS = (
    *("const_f", "const_i", "b", "h", "q_idx", "kv_idx", "spread_once", "spread_keys"),
    *("read_f", "read_rows_f", "read_i", "read_b", "where", "and", "or", "xor", "not"),
    *("i_to_f", "b_to_f", "f_to_i", "b_to_i", "f_to_b", "i_to_b"),
    *("neg_f", "abs_f", "sign_f", "floor_f", "round_f", "exp_f", "log_f", "sqrt_f", "tanh_f", "sigmoid_f", "sin_f"),
    *("cos_f", "add_f", "sub_f", "mul_f", "mul_add_f", "mul_sub_f", "sub_mul_f", "sum_mul_f"),
    *("div_f", "pow_f", "floordiv_f", "mod_f", "min_f", "max_f"),
    *("lt_f", "le_f", "eq_f", "ne_f"),
    *("neg_i", "abs_i", "sign_i", "add_i", "sub_i", "mul_i", "floordiv_i", "mod_i", "min_i", "max_i"),
    *("lt_i", "le_i", "eq_i", "ne_i", "shl_i", "shr_i"),
)  # as the rows of score_operations.def
_NUMBERS = {name: number for number, name in enumerate(OPERATIONS)}
_SAME_BITS = ("where", "and", "or", "xor", "not")  # operations that do not depend on the kind of their operands
_T = 0  # the register of the score
_FORMS = {PAIRS: 0, LANES: 1, KEYS: 2, ONCE: 3}  # how pairs read a value of a stage
_FORM = 2**20  # an operand is a virtual register, plus its form times this number


class TooLarge(ValueError):
    """Function that needs more registers than there are."""


class Instruction(NamedTuple):
    """Operation, stage, and virtual registers: the result and the operands. `words`: other operands."""

    operation: str
    stage: int
    to: int
    operands: tuple[int, ...] = ()
    words: tuple[int, ...] = ()
    keys: int = -1  # another operand: a virtual register of KEYS


class Merged(NamedTuple):
    """Operation of one instruction for several nodes, and the nodes that it reads; None: the number 1."""

    operation: str
    nodes: tuple[int | None, ...]


class Term(NamedTuple):
    """Gradient of a read: array, operand of the adjoint (-1: 1), index, index of the keys to add (-1: none), stage."""

    array: int
    adjoint: int
    place: int
    keys: int
    stage: int


class Section:
    """Instructions that compute some nodes of a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._code: list[list[Instruction]] = [[] for _ in range(4)]
        self._registers: dict[tuple[int, int], int] = {}  # (node, stage of the reader): operand
        self._count = 1
        self._merged: dict[int, Merged] = {}
        self.stages: dict[int, int] = {}

    def add(self, nodes: Iterable[int]) -> None:
        """Add the instructions of nodes and of all nodes that they depend on."""
        needed = self._graph.reachable(nodes)
        for number in needed:
            self._find_stage(number, self._graph.nodes[number])
        rows = {number for number in needed if self.rows(number) is not None}
        kept = set(nodes) - rows
        for number in needed:
            kept |= {x for x in self._graph.nodes[number].arguments if not self._reads_rows(number)}
        taken = self._merge(needed, set(nodes))
        for number in needed:
            if number not in taken and (number in kept or number not in rows):
                self._add(number, self._graph.nodes[number])

    def rows(self, number: int) -> tuple[int, int] | None:
        """Return the parts of lanes and of keys of an integer that is their sum, or None."""
        node = self._graph.nodes[number]
        if node.operation == "add" and node.kind == INT:
            first, second = node.arguments
            stages = (self.stages[first], self.stages[second])
            if stages == (LANES, KEYS):
                return first, second
        return None

    def _merge(self, needed: Sequence[int], wanted: set[int]) -> set[int]:
        """Find nodes that one instruction computes with arguments that nothing else reads; return these arguments."""
        uses = Counter(one for number in needed for one in self._graph.nodes[number].arguments)
        taken: set[int] = set()

        def alone(arguments: Sequence[int], operation: str, kind: str = FLOAT) -> int | None:
            for one in arguments:
                node = self._graph.nodes[one]
                is_it = node.operation == operation and node.kind == kind and self.stages[one] == PAIRS
                if is_it and uses[one] == 1 and one not in wanted:
                    return one
            return None

        def converted_sum(number: int | None) -> int | None:
            node = None if number is None else self._graph.nodes[number]
            return alone(node.arguments, "add", INT) if node and node.operation == "to_float" else None

        for number in reversed(needed):
            node = self._graph.nodes[number]
            if number in taken or self.stages[number] != PAIRS:
                continue
            if node.operation in ("add", "sub") and (product := alone(node.arguments, "mul")) is not None:
                at = node.arguments.index(product)
                name = "mul_add_f" if node.operation == "add" else ("mul_sub_f", "sub_mul_f")[at]
                operands = (*self._graph.nodes[product].arguments, node.arguments[1 - at])
                self._merged[number] = Merged(name, operands)
                taken.add(product)
                continue
            converted = alone(node.arguments, "to_float") if node.operation == "mul" else number
            total = converted_sum(converted)
            if converted is not None and total is not None:
                factor = node.arguments[1 - node.arguments.index(converted)] if converted != number else None
                self._merged[number] = Merged("sum_mul_f", (*self._graph.nodes[total].arguments, factor))
                taken |= {total, converted} - {number}
        return taken

    def pairs(self, number: int) -> int:
        """Return the operand that is a node for every pair."""
        return self._read(number, PAIRS)

    def own(self, number: int) -> int:
        """Return the virtual register that holds a node in its own stage."""
        return self._registers[number, self.stages[number]]

    def _reads_rows(self, number: int) -> bool:
        node = self._graph.nodes[number]
        return node.operation == READ and node.kind == FLOAT and self.rows(node.arguments[0]) is not None

    def _find_stage(self, number: int, node: Node) -> None:
        self.stages[number] = stage_of(node, [self.stages[argument] for argument in node.arguments])

    def _add(self, number: int, node: Node) -> None:
        stage = self.stages[number]
        if node.operation == SCORE:
            self._registers[number, PAIRS] = _T
            return
        if self._reads_rows(number):
            lanes, keys = self.rows(node.arguments[0]) or (0, 0)
            array = int(node.value or 0)
            found = self._emit("read_rows_f", stage, (self.own(lanes),), (array,), self.own(keys))
            self._registers[number, stage] = found
            return
        if number in self._merged:
            name, nodes = self._merged[number]
            operands = tuple([self._one() if one is None else self._read(one, stage) for one in nodes])
            self._registers[number, stage] = self._emit(name, stage, operands)
            return
        operands = tuple([self._read(argument, stage) for argument in node.arguments])
        kind = node.kind if node.operation == READ else self._kind_of_operands(node)
        name, words = _instruction(node, kind)
        self._registers[number, stage] = self._emit(name, stage, operands, words)

    def _kind_of_operands(self, node: Node) -> str:
        return self._graph.nodes[node.arguments[-1]].kind if node.arguments else node.kind

    def _read(self, number: int, stage: int) -> int:
        """Return the operand of a node that instructions of a stage read."""
        found = self._registers.get((number, stage))
        if found is None:
            source = self.stages[number]
            found = self._registers[number, source]
            if source == KEYS:
                found = self._emit("spread_keys", stage, (found,))
            elif stage != PAIRS:
                found = self._emit("spread_once", stage, (found,))
            if stage == PAIRS:
                found += _FORM * _FORMS[source]
            self._registers[number, stage] = found
        return found

    def _one(self) -> int:
        """Return the operand of pairs that is the number 1."""
        name, words = _instruction(Node(CONSTANT, FLOAT, value=1.0), FLOAT)
        return self._emit(name, ONCE, (), words) + _FORM * _FORMS[ONCE]

    def _emit(
        self, name: str, stage: int, operands: tuple[int, ...], words: tuple[int, ...] = (), keys: int = -1
    ) -> int:
        to, self._count = self._count, self._count + 1
        self._code[stage].append(Instruction(name, stage, to, operands, words, keys))
        return to

    def words(self, results: Sequence[int], terms: Sequence[Term] = ()) -> list[int]:
        """Return the section as words. results: operands of score, mask, slope and curvature; -1: none."""
        results, pairs = _in_place(list(results), self._code[PAIRS])
        code = [one for stage in (*self._code[:PAIRS], pairs) for one in stage]
        kept = {one % _FORM for one in (*results, *(x for term in terms for x in term[1:4])) if one != -1}
        place = _allocate(code, kept)
        count = 1 + max(place.values())
        if count > MOST_REGISTERS:
            raise TooLarge(f"needs {count} values at a time in a score function, of at most {MOST_REGISTERS}")

        def operand(one: int) -> int:
            return -1 if one == -1 else place[one % _FORM] + MOST_REGISTERS * (one // _FORM)

        reads_score = any(_T in one.operands for one in code) or _T in kept
        found = [count, *(operand(one) for one in results), int(reads_score), len(terms)]
        found += [len(stage) for stage in (*self._code[:PAIRS], pairs)]
        for one in code:
            read = (*(operand(x) for x in one.operands), *one.words, *([place[one.keys]] if one.keys >= 0 else ()))
            found += [_NUMBERS[one.operation], place[one.to], *(*read, 0, 0, 0)[:3]]
        for term in terms:
            found += [term.array, *(operand(x) for x in term[1:4]), term.stage]
        return found


def _in_place(results: list[int], pairs: list[Instruction]) -> tuple[list[int], list[Instruction]]:
    """Return the results and the instructions of pairs so that the last one writes the score, if nothing reads it."""
    score = results[0]
    last = next((one for one in pairs if one.to == score), None)
    if last is None or score in results[1:] or _T in results[1:] or any(score in one.operands for one in pairs):
        return results, pairs
    return [_T, *results[1:]], [*(one for one in pairs if one is not last), last._replace(to=_T)]


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
    read = [[x % _FORM for x in (*one.operands, *([one.keys] if one.keys >= 0 else ()))] for one in code]
    first_of_pairs = next((i for i, one in enumerate(code) if one.stage == PAIRS), end)
    last = {one.to: i for i, one in enumerate(code)}
    made = dict(last)
    for i, operands in enumerate(read):
        for operand in operands:
            if operand != _T:
                last[operand] = end if i >= first_of_pairs > made[operand] else i
    last |= dict.fromkeys(kept - {_T}, end)
    place, count = {_T: _T}, 1
    free: list[int] = []
    ends: dict[int, list[int]] = {}
    for register, i in last.items():
        ends.setdefault(i, []).append(register)
    for i, instruction in enumerate(code):
        if instruction.to != _T:
            if not free:
                free.append(count)
                count += 1
            place[instruction.to] = free.pop()
        free += [place[register] for register in ends.get(i, ()) if register != _T]
    return place


def limits(problem: Problem) -> list[str]:
    """Return why the engine does not support the functions of a problem, or []."""
    if not problem.score:
        return []
    graph = problem.functions
    if max(problem.seqlen_q, problem.seqlen_k, *(array.size for array in graph.arrays), 0) >= 2**31:
        return ["counts queries, keys and elements of captured arrays in score functions up to 2^31 - 1"]
    try:
        lower(graph, second=problem.pass_ is SECOND)
    except TooLarge as error:
        return [str(error)]
    return []


@lru_cache(256)
def lower(graph: Graph, *, second: bool = False) -> words_of[int]:
    """Return the program of a graph: its arrays, and the sections for the forward pass, the slope and the gradients.

    second: with the sections for the second pass, which are empty otherwise.

    Raises:
        TooLarge: the functions need too many registers.
    """
    found = [VERSION, len(graph.arrays)]
    starts = {True: 0, False: 0}
    for one in graph.arrays:
        floats = one.kind == FLOAT
        found += [0 if floats else 1, starts[floats], one.size]
        starts[floats] += one.size
    found += _results(graph)
    empty = Section(graph).words((-1, -1, -1, -1))
    if graph.score is None:
        return words_of("i", found + _results(graph) + 3 * empty)
    first = differentiate(graph)
    found += _results(first.graph, first.slope) + _gradients(first.graph, first.reads)
    if not second:
        return words_of("i", found + 2 * empty)
    again = differentiate(slope_of(graph))
    whole = again.graph._replace(score=graph.score)
    found += _results(whole, first.slope, again.slope) + _gradients(whole, again.reads)
    return words_of("i", found)


def _results(graph: Graph, slope: int | None = None, curvature: int | None = None) -> list[int]:
    """Return the section that computes score, mask, slope and curvature of a graph. None: not computed."""
    wanted = [graph.score, graph.mask, slope, curvature]
    for at, implied in ((2, 1.0), (3, 0.0)):
        number = wanted[at]
        if number is not None and _is_constant(graph, number, implied):
            wanted[at] = None
    simple, moved = simplify(graph, [one for one in wanted if one is not None])
    section = Section(simple)
    section.add(moved.values())
    return section.words([-1 if one is None else section.pairs(moved[one]) for one in wanted])


def _gradients(graph: Graph, reads: Sequence[tuple[int, int]]) -> list[int]:
    """Return the section of the gradients of captured arrays. reads: reads and the derivative by each."""
    simple, moved = simplify(graph, [one for read in reads for one in read])
    section = Section(simple)
    indices = [simple.nodes[moved[read]].arguments[0] for read, _ in reads]
    adjoints = [None if _is_constant(graph, adjoint, 1.0) else moved[adjoint] for _, adjoint in reads]
    section.add([*indices, *(one for one in adjoints if one is not None)])
    terms = []
    for (read, _), index, adjoint in zip(reads, indices, adjoints, strict=True):
        number, operand = int(graph.nodes[read].value or 0), -1 if adjoint is None else section.pairs(adjoint)
        rows = section.rows(index)
        if rows is None:
            terms.append(Term(number, operand, section.own(index), -1, section.stages[index]))
        else:
            terms.append(Term(number, operand, section.own(rows[0]), section.own(rows[1]), LANES))
    return section.words((-1, -1, -1, -1), terms)


def _is_constant(graph: Graph, number: int, value: float) -> bool:
    node = graph.nodes[number]
    return node.operation == CONSTANT and node.value == value
