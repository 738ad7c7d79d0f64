"""Integers of a graph as linear functions of the indices of the query and of the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .graph import INT, Graph, Node


class Linear(NamedTuple):
    """Integer q * q_idx + kv * kv_idx + constant, plus multiples of other nodes as pairs (node, factor)."""

    q: int
    kv: int
    constant: int
    others: tuple[tuple[int, int], ...] = ()

    @property
    def is_constant(self) -> bool:
        return self.q == self.kv == 0 and not self.others


def linear(graph: Graph, number: int) -> Linear | None:
    """Return an integer as a linear function, or None for another kind. Shared terms are visited once."""
    if graph.nodes[number].kind != INT:
        return None
    found: dict[int, Linear] = {}
    waiting = [number]
    while waiting:
        one = waiting[-1]
        node = graph.nodes[one]
        missing = [x for x in node.arguments if x not in found] if node.operation in _SUMS else []
        if missing:
            waiting += missing
        else:
            found[waiting.pop()] = _combined(node, one, found)
    return found[number]


_SUMS = ("add", "sub", "neg")


def _combined(node: Node, number: int, found: Mapping[int, Linear]) -> Linear:
    """Return an integer as a linear function from the functions of its terms."""
    if node.operation == "constant":
        return Linear(0, 0, int(node.value or 0))
    if node.operation in ("q_idx", "kv_idx"):
        return Linear(1, 0, 0) if node.operation == "q_idx" else Linear(0, 1, 0)
    if node.operation not in _SUMS:
        return Linear(0, 0, 0, ((number, 1),))
    first, last = found[node.arguments[0]], found[node.arguments[-1]]
    if node.operation == "neg":
        return combine(Linear(0, 0, 0), first, -1)
    return combine(first, last, 1 if node.operation == "add" else -1)


def combine(a: Linear, b: Linear, factor: int) -> Linear:
    """Return a + factor * b."""
    others = dict(a.others)
    for node, times in b.others:
        others[node] = others.get(node, 0) + factor * times
    kept = tuple(sorted((node, times) for node, times in others.items() if times))
    return Linear(a.q + factor * b.q, a.kv + factor * b.kv, a.constant + factor * b.constant, kept)


def is_distance(x: Linear | None) -> bool:
    """Return whether a number is q_idx - kv_idx or kv_idx - q_idx."""
    return x in (Linear(1, -1, 0), Linear(-1, 1, 0))
