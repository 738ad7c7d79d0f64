"""Graph of a score function and a mask function: elementwise operations on the score, the indices and captured arrays.

A graph has no array values. Its text is the key of plans and an argument of operators, so it must not depend on
anything but the functions and the shapes of the captured arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

FLOAT, INT, BOOL = "f", "i", "b"  # kinds of values: the compute dtype, int32, bool
SCORE, CONSTANT, READ = "score", "constant", "read"
INDICES = ("b", "h", "q_idx", "kv_idx")  # inputs of kind INT


class Node(NamedTuple):
    """Value in a graph: an operation on earlier nodes, an input, a constant, or a read of a captured array."""

    operation: str
    kind: str
    arguments: tuple[int, ...] = ()
    value: float | None = None  # of a constant; for a read, the number of the array


class Captured(NamedTuple):
    """Array that a function reads: shape, kind, and whether its gradient is wanted."""

    shape: tuple[int, ...]
    kind: str
    gradient: bool = False

    @property
    def size(self) -> int:
        return prod(self.shape)


class Graph(NamedTuple):
    """Nodes in the order of computation, the results of score_mod and mask_mod (None: absent), and captured arrays."""

    nodes: tuple[Node, ...] = ()
    score: int | None = None
    mask: int | None = None
    arrays: tuple[Captured, ...] = ()

    @property
    def text(self) -> str:
        """Return the graph as text, which `parse` reads."""
        import json  # here, because importing the package must stay fast

        return json.dumps(self, separators=(",", ":"))

    def reachable(self, results: Iterable[int]) -> list[int]:
        """Return the nodes that the results depend on, in the order of computation."""
        needed = set(results)
        for number in range(len(self.nodes) - 1, -1, -1):
            if number in needed:
                needed.update(self.nodes[number].arguments)
        return sorted(needed)

    @property
    def reads(self) -> tuple[int, ...]:
        """Return the nodes that read captured arrays."""
        return tuple(number for number, node in enumerate(self.nodes) if node.operation == READ)

    def sizes(self, *, floats: bool) -> int:
        """Return the number of elements of all floating-point arrays, or of all others."""
        return sum(array.size for array in self.arrays if (array.kind == FLOAT) == floats)


@lru_cache(1024)
def parse(text: str) -> Graph:
    """Return the graph of a text.

    Raises:
        ValueError: the text is not that of a graph.
    """
    import json

    try:
        nodes, score, mask, arrays = json.loads(text)
        return Graph(
            tuple([Node(name, kind, tuple(arguments), value) for name, kind, arguments, value in nodes]),
            score,
            mask,
            tuple([Captured(tuple(shape), kind, gradient) for shape, kind, gradient in arrays]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"score must be the text of a traced graph, got {text!r}.") from error


def split(graph: Graph, values: Any, indices: Any) -> list[Any]:
    """Return the captured arrays as views of their flat concatenations: floating-point values, and all others."""
    found, starts = [], {True: 0, False: 0}
    for array in graph.arrays:
        floats = array.kind == FLOAT
        start = starts[floats]
        starts[floats] = start + array.size
        flat = (values if floats else indices)[start : start + array.size]
        found.append(flat.reshape(array.shape))
    return found
