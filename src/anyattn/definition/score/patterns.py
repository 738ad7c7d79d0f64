"""Parts of a graph that built-in arguments express.

A mask function is a conjunction of terms. Terms that compare only the query's index with the key's become an interval,
which every backend computes fast. Query i is then at position i (alignment "top-left"), and key j at j. Other terms are
a captured boolean array, and the lengths of sequences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import NamedTuple

from .builder import Builder
from .graph import BOOL, INT, Graph
from .linear import Linear, combine, is_distance, linear
from .score_patterns import SCORE_ARGUMENTS, Operand, Scored, operand, peel

# Arguments that functions may become. A call allows those that it does not use otherwise.
INTERVAL, LENGTHS, MASK = "interval", "lengths", "mask"
CAUSAL = "causal"  # a property of the call and no argument: it is causal, and its queries are at their indices
EVERY = frozenset((INTERVAL, LENGTHS, MASK)) | SCORE_ARGUMENTS


class Lengths(NamedTuple):
    """Number of visible keys of each sequence: element b of a captured array, plus a constant."""

    array: int
    added: int


class Recognized(NamedTuple):
    """Rest of a graph, and the built-in arguments of the other parts."""

    graph: Graph
    left: int | None = None
    right: int | None = None
    chunk: int = 0
    lengths: Lengths | None = None
    mask: Operand | None = None
    score: Scored = Scored()

    @property
    def is_nothing(self) -> bool:
        return self[1:] == (None, None, 0, None, None, Scored())


@lru_cache(256)
def recognize(graph: Graph, nheads: int, allowed: frozenset[str] = EVERY) -> Recognized:
    """Return the allowed built-in arguments of a graph, and the graph of the rest."""
    found = _Terms(graph, allowed)
    score, number = Scored(), graph.score
    if number is not None:
        is_causal = CAUSAL in allowed or found.interval.get("right") == 0
        score, number = peel(graph, number, nheads, allowed, is_causal=is_causal)
    build = Builder(graph)
    mask = None
    for term in found.rest:
        mask = term if mask is None else build.apply("and", mask, term)
    rest = build.graph(number, mask, graph.arrays)
    return Recognized(rest, **found.interval, lengths=found.lengths, mask=found.mask, score=score)


class _Terms:
    """Terms of a mask function by the argument that each becomes."""

    def __init__(self, graph: Graph, allowed: Collection[str]) -> None:
        self.interval: dict[str, int] = {}
        self.lengths: Lengths | None = None
        self.mask: Operand | None = None
        self.rest: list[int] = []
        for term in () if graph.mask is None else terms(graph, graph.mask):
            bounds = _bounds(graph, term) if INTERVAL in allowed else {}
            lengths = _lengths(graph, term) if LENGTHS in allowed else None
            mask = operand(graph, term) if MASK in allowed else None
            chunk = self.interval.get("chunk")
            if bounds and (chunk is None or bounds.get("chunk", chunk) == chunk):
                self.interval |= {name: min(bound, self.interval.get(name, bound)) for name, bound in bounds.items()}
            elif lengths and self.lengths is None:
                self.lengths = lengths
            elif mask and self.mask is None:
                self.mask = mask
            else:
                self.rest.append(term)  # a call has one chunk, one mask and one table of lengths


def terms(graph: Graph, number: int) -> Iterator[int]:
    """Yield the terms of a conjunction of booleans, each once."""
    waiting, known = [number], {number}
    while waiting:
        one = waiting.pop()
        node = graph.nodes[one]
        if node.operation != "and" or node.kind != BOOL:
            yield one
            continue
        waiting += [x for x in dict.fromkeys(node.arguments[::-1]) if x not in known]
        known.update(node.arguments)


def _lengths(graph: Graph, term: int) -> Lengths | None:
    """Return the lengths of kv_idx < lengths[b] + constant, or None."""
    node = graph.nodes[term]
    if node.operation not in ("le", "lt"):
        return None
    a, b = (linear(graph, one) for one in node.arguments)
    if a is None or b is None:
        return None
    difference = combine(b, a, -1)  # lengths[b] + constant - kv_idx
    if difference[:2] != (0, -1) or len(difference.others) != 1 or difference.others[0][1] != 1:
        return None
    found = operand(graph, difference.others[0][0])
    if found is None or found.axes != (0,):
        return None
    return Lengths(found.array, difference.constant + int(node.operation == "le"))


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
        distance, limit = linear(graph, graph.nodes[small].arguments[0]), linear(graph, large)
        if limit and is_distance(distance) and limit.is_constant:
            return _nonnegative(left=limit.constant - strict, right=limit.constant - strict)
        return {}
    a, b = linear(graph, small), linear(graph, large)
    if a is None or b is None:
        return {}
    difference = combine(b, a, -1)
    limit = Linear(0, 0, difference.constant - strict)  # difference >= 0
    if difference.others:
        return {}
    if difference[:2] == (1, -1):
        return _nonnegative(right=limit.constant)
    return _nonnegative(left=limit.constant) if difference[:2] == (-1, 1) else {}


def _nonnegative(**bounds: int) -> dict[str, int]:
    return bounds if min(bounds.values()) >= 0 else {}


def _chunk(graph: Graph, a: int, b: int) -> dict[str, int]:
    """Return the chunk of q_idx // chunk == kv_idx // chunk, or {}."""
    sizes = set()
    names = set()
    for number in (a, b):
        node = graph.nodes[number]
        divisor = linear(graph, node.arguments[1]) if node.operation == "floordiv" and node.kind == INT else None
        if divisor is None or not divisor.is_constant or divisor.constant < 1:
            return {}
        sizes.add(divisor.constant)
        names.add(graph.nodes[node.arguments[0]].operation)
    return {"chunk": sizes.pop()} if len(sizes) == 1 and names == {"q_idx", "kv_idx"} else {}
