"""Parts of a graph that built-in arguments express: causal masks, windows, chunks and ALiBi.

A mask function is a conjunction of terms. The terms that compare only the query's index with the key's become an
interval, which every backend computes fast. Query i is then at position i (alignment "top-left"), and key j at j.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .builder import Builder
from .graph import BOOL, FLOAT, INT, READ, SCORE, Graph, Node


class Recognized(NamedTuple):
    """Rest of a graph, the interval of visible keys, and the slopes of ALiBi.

    slopes: number of a captured array (nheads,) without a gradient, or None.
    """

    graph: Graph
    left: int | None = None
    right: int | None = None
    chunk: int = 0
    slopes: int | None = None


class Linear(NamedTuple):
    """Integer q * q_idx + kv * kv_idx + constant."""

    q: int
    kv: int
    constant: int


def recognize(graph: Graph, nheads: int) -> Recognized:
    """Return the built-in arguments of a graph, and the graph of the rest."""
    sides: dict[str, int] = {}
    rest = []
    for term in () if graph.mask is None else _terms(graph, graph.mask):
        found = _bounds(graph, term)
        if not found:
            rest.append(term)
        elif sides.get("chunk", found.get("chunk")) != found.get("chunk", sides.get("chunk")):
            rest.append(term)  # a call has one chunk
        else:
            sides |= {name: min(bound, sides.get(name, bound)) for name, bound in found.items()}
    slopes = _slopes(graph, nheads)
    build = Builder(graph)
    mask = None
    for term in rest:
        mask = term if mask is None else build.apply("and", mask, term)
    score = graph.score if slopes is None else None
    return Recognized(build.graph(score, mask, graph.arrays), slopes=slopes, **sides)


def _terms(graph: Graph, number: int) -> Iterator[int]:
    """Yield the terms of a conjunction of booleans."""
    node = graph.nodes[number]
    if node.operation == "and" and node.kind == BOOL:
        for argument in node.arguments:
            yield from _terms(graph, argument)
    else:
        yield number


def _bounds(graph: Graph, term: int) -> dict[str, int]:
    """Return the bounds (left, right or chunk) that a term is equal to, or {}."""
    node = graph.nodes[term]
    if node.operation == "eq":
        return _chunk(graph, *node.arguments)
    if node.operation not in ("le", "lt"):
        return {}
    small, large = node.arguments
    strict = int(node.operation == "lt")
    if graph.nodes[small].operation == "abs":
        distance, limit = _linear(graph, graph.nodes[small].arguments[0]), _linear(graph, large)
        if distance and limit and _is_distance(distance) and (limit.q, limit.kv) == (0, 0):
            return _nonnegative(left=limit.constant - strict, right=limit.constant - strict)
        return {}
    a, b = _linear(graph, small), _linear(graph, large)
    if a is None or b is None:
        return {}
    difference = Linear(b.q - a.q, b.kv - a.kv, b.constant - a.constant - strict)  # >= 0
    if difference[:2] == (1, -1):
        return _nonnegative(right=difference.constant)
    return _nonnegative(left=difference.constant) if difference[:2] == (-1, 1) else {}


def _nonnegative(**bounds: int) -> dict[str, int]:
    return bounds if min(bounds.values()) >= 0 else {}


def _is_distance(x: Linear) -> bool:
    return x in (Linear(1, -1, 0), Linear(-1, 1, 0))


def _chunk(graph: Graph, a: int, b: int) -> dict[str, int]:
    """Return the chunk of q_idx // chunk == kv_idx // chunk, or {}."""
    sizes = set()
    names = set()
    for number in (a, b):
        node = graph.nodes[number]
        divisor = _linear(graph, node.arguments[1]) if node.operation == "floordiv" and node.kind == INT else None
        if divisor is None or divisor[:2] != (0, 0) or divisor.constant < 1:
            return {}
        sizes.add(divisor.constant)
        names.add(graph.nodes[node.arguments[0]].operation)
    return {"chunk": sizes.pop()} if len(sizes) == 1 and names == {"q_idx", "kv_idx"} else {}


def _linear(graph: Graph, number: int) -> Linear | None:
    """Return an integer as a linear function of q_idx and kv_idx, or None."""
    node = graph.nodes[number]
    if node.kind != INT:
        return None
    if node.operation == "constant":
        return Linear(0, 0, int(node.value or 0))
    if node.operation in ("q_idx", "kv_idx"):
        return Linear(1, 0, 0) if node.operation == "q_idx" else Linear(0, 1, 0)
    parts = [_linear(graph, one) for one in node.arguments] if node.operation in ("add", "sub", "neg") else [None]
    known = [one for one in parts if one is not None]
    if len(known) < len(parts):
        return None
    if node.operation == "neg":
        return Linear(*(-x for x in known[0]))
    sign = 1 if node.operation == "add" else -1
    return Linear(*(x + sign * y for x, y in zip(*known, strict=True)))


def _slopes(graph: Graph, nheads: int) -> int | None:
    """Return the array of score - array[h] * abs(q_idx - kv_idx), or None."""
    if graph.score is None:
        return None
    root = graph.nodes[graph.score]
    if root.operation != "sub" or graph.nodes[root.arguments[0]].operation != SCORE:
        return None
    product = graph.nodes[root.arguments[1]]
    if product.operation != "mul":
        return None
    for slope, distance in (product.arguments, product.arguments[::-1]):
        read = graph.nodes[slope]
        if _is_slope(graph, read, nheads) and _is_absolute_distance(graph, distance):
            return int(read.value or 0)
    return None


def _is_slope(graph: Graph, node: Node, nheads: int) -> bool:
    if node.operation != READ or node.kind != FLOAT or len(node.arguments) != 1:
        return False
    array = graph.arrays[int(node.value or 0)]
    return graph.nodes[node.arguments[0]].operation == "h" and array.shape == (nheads,) and not array.gradient


def _is_absolute_distance(graph: Graph, number: int) -> bool:
    """Return whether a node is abs(q_idx - kv_idx) as a floating-point number."""
    operations = set()
    while graph.nodes[number].operation in ("abs", "to_float"):
        operations.add(graph.nodes[number].operation)
        number = graph.nodes[number].arguments[0]
    distance = _linear(graph, number)
    return operations == {"abs", "to_float"} and distance is not None and _is_distance(distance)
