"""Check of the reads of score functions, before any computation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .problem import Problem
from .score import intervals
from .score.graph import FLOAT, READ, parse, split
from .score.interval_rules import Interval
from .score.intervals import Range
from .sequences import Tables, sequences


def check_reads(problem: Problem, tables: Tables, captured_indices: Any) -> None:
    """Raise if a read of a captured array may be out of bounds for the sizes of this call.

    The check bounds every index by interval arithmetic. It does not take the mask into account.

    Raises:
        ValueError: the message names the array's shape, the axis and the range of the index.
    """
    graph = problem.functions
    lengths = [(s.n_q, s.n_k) for s in sequences(problem, tables)]
    n_q, n_k = (max((length[axis] for length in lengths), default=0) for axis in (0, 1))
    if min(problem.batch, n_q, n_k) == 0:
        return
    ranges = Range(*[_upto(size) for size in (problem.batch, problem.nheads, n_q, n_k)])
    values = np.zeros(graph.sizes(floats=True), np.bool_)
    arrays = split(graph, values, np.zeros(0, np.int32) if captured_indices is None else captured_indices)
    known = [None if array.kind == FLOAT else x for array, x in zip(graph.arrays, arrays, strict=True)]
    intervals.check(graph, ranges, known)


@lru_cache(256)
def check_sizes(text: str, sizes: tuple[int, int, int, int]) -> None:
    """Raise for the reads whose indices do not depend on values of captured arrays, which are on a device.

    Args:
        text: of the graph.
        sizes: batch, query heads, queries and keys, which all exist.

    Raises:
        ValueError: like `check_reads`.
    """
    graph = parse(text)
    if 0 in sizes:
        return
    unknown: set[int] = set()
    for number, node in enumerate(graph.nodes):
        if node.operation == READ or not unknown.isdisjoint(node.arguments):
            unknown.add(number)
    intervals.check(graph, Range(*map(_upto, sizes)), [None] * len(graph.arrays), unknown)


def _upto(size: int) -> Interval:
    return Interval(np.float64(0), np.float64(size - 1))
