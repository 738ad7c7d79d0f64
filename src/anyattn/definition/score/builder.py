"""Construction of graphs: equal nodes are stored once, constants are folded, and kinds are promoted."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from .graph import BOOL, CONSTANT, FLOAT, INT, READ, Captured, Graph, Node
from .operations import OPERATIONS

_RANK = {BOOL: 0, INT: 1, FLOAT: 2}
_OF_BOOLEANS = {"add": "or", "mul": "and", "max": "or", "min": "and"}  # as in NumPy and torch


class Builder:
    """Nodes of a graph under construction. Methods take and return numbers of nodes."""

    def __init__(self, graph: Graph | None = None) -> None:
        self.nodes: list[Node] = [] if graph is None else list(graph.nodes)
        self._numbers = {_key(node): number for number, node in enumerate(self.nodes)}

    def graph(self, score: int | None, mask: int | None, arrays: tuple[Captured, ...]) -> Graph:
        """Return the graph of the nodes that the results need."""
        return _needed(Graph(tuple(self.nodes), score, mask, arrays))

    def add(self, node: Node) -> int:
        """Return the number of a node, which is new unless an equal node exists."""
        key = _key(node)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.nodes)
            self.nodes.append(node)
        return number

    def kind(self, number: int) -> str:
        return self.nodes[number].kind

    def constant(self, value: Any) -> int:
        """Return a constant, whose Python type decides its kind."""
        if isinstance(value, (bool, np.bool_)):
            return self.add(Node(CONSTANT, BOOL, value=bool(value)))
        if isinstance(value, (int, np.integer)):
            return self.add(Node(CONSTANT, INT, value=int(value)))
        number = float(value)
        if number == 0 and math.copysign(1, number) < 0:  # equal graphs must compute the same, and -0.0 equals 0.0
            return self.add(Node("neg", FLOAT, (self.add(Node(CONSTANT, FLOAT, value=0.0)),)))
        return self.add(Node(CONSTANT, FLOAT, value=number))

    def constant_value(self, number: int) -> Any:
        """Return the value of a constant, or None for any other node."""
        node = self.nodes[number]
        return node.value if node.operation == CONSTANT else None

    def read(self, array: int, kind: str, indices: tuple[int, ...]) -> int:
        return self.add(Node(READ, kind, indices, array))

    def cast(self, number: int, kind: str) -> int:
        """Return the value as another kind."""
        if self.kind(number) == kind:
            return number
        return self._node({FLOAT: "to_float", INT: "to_int", BOOL: "to_bool"}[kind], kind, (number,))

    def apply(self, name: str, *arguments: int) -> int:
        """Return an operation on arguments of any kinds, which are promoted to kinds that the operation accepts."""
        if name == "where":
            condition, yes, no = arguments
            return self._where(self.cast(condition, BOOL), *self._promote((yes, no), OPERATIONS[name].accepts))
        if name in _OF_BOOLEANS and all(self.kind(number) == BOOL for number in arguments):
            name = _OF_BOOLEANS[name]
        operation = OPERATIONS[name]
        promoted = self._promote(arguments, operation.accepts)
        kind = operation.result or self.kind(promoted[0])
        return self._simplified(name, promoted) or self._node(name, kind, promoted)

    def _promote(self, arguments: tuple[int, ...], accepts: str) -> tuple[int, ...]:
        kind = max((self.kind(number) for number in arguments), key=_RANK.__getitem__)
        if kind not in accepts:
            wider = [one for one in accepts if _RANK[one] > _RANK[kind]]
            if not wider:
                raise KindError(kind, accepts)
            kind = min(wider, key=_RANK.__getitem__)
        return tuple([self.cast(number, kind) for number in arguments])

    def _where(self, condition: int, yes: int, no: int) -> int:
        known = self.constant_value(condition)
        if known is not None:
            return yes if known else no
        return yes if yes == no else self._node("where", self.kind(yes), (condition, yes, no))

    def _simplified(self, name: str, arguments: tuple[int, ...]) -> int | None:
        """Return a node that is equal, special values included, or None. The sign of a zero plus 0 is not kept."""
        values = [self.constant_value(number) for number in arguments]
        if len(arguments) != 2:
            return None
        (a, b), (x, y) = arguments, values
        if (name == "mul" and y == 1) or (name in ("div", "pow") and y == 1) or (name in ("add", "sub") and y == 0):
            return a
        if (name == "mul" and x == 1) or (name == "add" and x == 0):
            return b
        if name in ("and", "or") and self.kind(a) == BOOL:
            neutral = name == "and"
            for one, other, known in ((a, b, y), (b, a, x)):
                if known is not None:
                    return one if known is neutral else other if known is not None else None
        return None

    def _node(self, name: str, kind: str, arguments: tuple[int, ...]) -> int:
        values = [self.constant_value(number) for number in arguments]
        if all(value is not None for value in values):
            with np.errstate(all="ignore"):
                typed = [np.float64(v) if self.kind(n) == FLOAT else v for n, v in zip(arguments, values, strict=True)]
                found = OPERATIONS[name].compute(*typed)
            python: dict[str, Any] = {FLOAT: float, INT: int, BOOL: bool}
            return self.constant(python[kind](found))
        return self.add(Node(name, kind, arguments))


@lru_cache(256)
def _needed(graph: Graph) -> Graph:
    """Return the graph without the nodes that no result needs."""
    kept = graph.reachable([result for result in (graph.score, graph.mask) if result is not None])
    place = {number: position for position, number in enumerate(kept)}
    nodes = [graph.nodes[number] for number in kept]
    moved = [node._replace(arguments=tuple([place[one] for one in node.arguments])) for node in nodes]
    return Graph(tuple(moved), _at(place, graph.score), _at(place, graph.mask), graph.arrays)


def without_unread_arrays(graph: Graph) -> tuple[Graph, list[int]]:
    """Return the graph with those arrays alone that it reads, and their numbers before."""
    kept = sorted({int(graph.nodes[number].value or 0) for number in graph.reads})
    place = {number: position for position, number in enumerate(kept)}
    nodes = tuple([n._replace(value=place[int(n.value or 0)]) if n.operation == READ else n for n in graph.nodes])
    return graph._replace(nodes=nodes, arrays=tuple([graph.arrays[number] for number in kept])), kept


class KindError(TypeError):
    """Operation on values of a kind that it does not accept."""

    def __init__(self, kind: str, accepts: str) -> None:
        self.kind, self.accepts = kind, accepts
        super().__init__(f"kind {kind} is not one of {accepts}")


def _key(node: Node) -> tuple[Any, ...]:
    return (node.operation, node.kind, node.arguments, repr(node.value))  # 0.0 and -0.0 differ, NaN equals NaN


def _at(place: dict[int, int], number: int | None) -> int | None:
    return None if number is None else place[number]
