"""Check of the reads of score functions, before any computation."""

from __future__ import annotations

from typing import Any

import numpy as np

from .problem import Problem
from .score import intervals
from .score.graph import FLOAT, split
from .score.intervals import Interval, Range
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


def _upto(size: int) -> Interval:
    return Interval(np.float64(0), np.float64(size - 1))
