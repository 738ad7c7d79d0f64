"""Simpler graphs for score programs: flat indices, sums of integers in parts of one stage, and shifts."""

from __future__ import annotations

from collections.abc import Sequence

from ...definition.score.builder import Builder
from ...definition.score.graph import INT, READ, SCORE, Graph, Node

ONCE, LANES, KEYS, PAIRS = range(4)  # stages: what a value depends on; a value of LANES and KEYS is one of PAIRS
_STAGES = {"b": ONCE, "h": LANES, "q_idx": LANES, "kv_idx": KEYS, SCORE: PAIRS}
LARGEST = 2**31 - 1

Terms = dict[int, int]  # nodes and their factors; key -1: the constant


def join(a: int, b: int) -> int:
    """Return the stage of a value that depends on values of two stages."""
    if a == b or ONCE in (a, b):
        return max(a, b)
    return PAIRS


def stage_of(node: Node, of_arguments: Sequence[int]) -> int:
    """Return the stage of a node from the stages of its arguments."""
    stage = _STAGES.get(node.operation, ONCE)
    for one in of_arguments:
        stage = join(stage, one)
    return stage


def simplify(graph: Graph, wanted: Sequence[int]) -> tuple[Graph, dict[int, int]]:
    """Return a graph whose reads have one index, in the flat array, and the places of the wanted nodes in it.

    A sum of integers becomes a part of the lanes plus a part of the keys, and what depends on both. Division and
    remainder of integers by a power of two become a shift and a bitwise and.
    """
    work = _Simplifier()
    for number in graph.reachable(wanted):
        work.add(number, graph.nodes[number], graph)
    simple = Graph(tuple(work.build.nodes), None, None, graph.arrays)
    return simple, {one: work.place[one] for one in wanted}


class _Simplifier:
    def __init__(self) -> None:
        self.build = Builder()
        self.place: dict[int, int] = {}
        self._terms: dict[int, Terms] = {}  # of nodes in the new graph
        self._stages: list[int] = []

    def add(self, number: int, node: Node, graph: Graph) -> None:
        arguments = tuple([self.place[one] for one in node.arguments])
        if node.operation == READ:
            array = int(node.value or 0)
            index = self._flat_index(graph.arrays[array].shape, arguments)
            self.place[number] = self.build.read(array, node.kind, (index,))
        elif node.kind == INT and node.operation in ("add", "sub", "neg", "mul"):
            self.place[number] = self._arithmetic(node.operation, arguments)
        else:
            self.place[number] = _divided(self.build, node, arguments)

    def _flat_index(self, shape: Sequence[int], indices: Sequence[int]) -> int:
        flat = self.build.constant(0)
        for index, size in zip(indices, shape, strict=True):
            flat = self._arithmetic("add", (self._arithmetic("mul", (flat, self.build.constant(size))), index))
        return flat

    def _arithmetic(self, name: str, arguments: tuple[int, ...]) -> int:
        """Return an operation on integers, whose sums and products wrap around."""
        first, last = self._terms_of(arguments[0]), self._terms_of(arguments[-1])
        if name == "mul":
            known = next((terms.get(-1, 0) for terms in (first, last) if set(terms) <= {-1}), None)
            if known is None:
                return self.build.apply(name, *arguments)
            other = last if set(first) <= {-1} else first
            found = {node: known * factor for node, factor in other.items()}
        else:
            sign = 1 if name == "add" else -1
            found = {} if name == "neg" else dict(first)
            for node, factor in last.items():
                found[node] = found.get(node, 0) + sign * factor
        found = {node: factor for node, factor in found.items() if factor}
        if any(abs(factor) > LARGEST for factor in found.values()):
            return self.build.apply(name, *arguments)
        number = self._sum(found)
        self._terms[number] = found
        return number

    def _terms_of(self, number: int) -> Terms:
        value = self.build.constant_value(number)
        if value is not None:
            return {-1: int(value)} if value else {}
        return self._terms.get(number, {number: 1})

    def _sum(self, terms: Terms) -> int:
        """Return the sum of terms: those of one stage first, with the constant among the lanes."""
        parts: dict[int, Terms] = {}
        for node, factor in terms.items():
            stage = self._stage(node) if node >= 0 else ONCE
            parts.setdefault(stage, {})[node] = factor
        if ONCE in parts and LANES in parts:
            parts[LANES] |= parts.pop(ONCE)
        total = None
        for stage in sorted(parts):
            part = self._part(parts[stage])
            total = part if total is None else self.build.apply("add", total, part)
        return self.build.constant(0) if total is None else total

    def _part(self, terms: Terms) -> int:
        total = None
        for node, factor in sorted(terms.items(), key=lambda term: (term[1] < 0, term[0])):
            one = self.build.constant(abs(factor)) if node < 0 else node
            if node >= 0 and abs(factor) != 1:
                one = self.build.apply("mul", node, self.build.constant(abs(factor)))
            if total is None:
                total = one if factor > 0 else self.build.apply("neg", one)
            else:
                total = self.build.apply("add" if factor > 0 else "sub", total, one)
        assert total is not None
        return total

    def _stage(self, number: int) -> int:
        for node in self.build.nodes[len(self._stages) :]:
            self._stages.append(stage_of(node, [self._stages[x] for x in node.arguments]))
        return self._stages[number]


def _divided(build: Builder, node: Node, arguments: tuple[int, ...]) -> int:
    if node.operation in ("floordiv", "mod") and node.kind == INT:
        divisor = build.constant_value(arguments[1])
        if divisor and divisor > 0 and divisor & (divisor - 1) == 0:
            if node.operation == "mod":
                return build.apply("and", arguments[0], build.constant(divisor - 1))
            return build.apply("shr", arguments[0], build.constant(divisor.bit_length() - 1))
    return build.add(node._replace(arguments=arguments))
