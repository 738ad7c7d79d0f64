"""Checks of problems that are too large to compute in float64: a part of them, exactly and with the same budgets.

The parts are the same every time. Of the forward they are some rows of some heads. A key's gradients need every row, so
of the backward they are whole heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..definition import accuracy
from ..definition.accuracy import Expected
from ..definition.dtypes import widen
from ..definition.inputs import TABLES
from ..definition.problem import Problem
from ..definition.reference import Part
from ..definition.sequences import Sequence, sequences
from .problems import describe, to_numpy

ALL_SCORES = 2**21  # of all heads together: a problem with more is compared in parts
ALL_KEYS = 2**24  # values of k and v: the same
ROWS = 24  # of a head
SCORES = 2**20  # of one part of the backward, which bounds the memory


def expected_results(
    arguments: Mapping[str, Any], dout: Any = None, dlse: Any = None, *, random: bool = False
) -> dict[str, Expected]:
    """Compute what a call must return: everything, or of a large problem a sample.

    Args:
        arguments: of `attention_forward`, on NumPy arrays or torch tensors.
        dout, dlse: gradients of out and lse, for the results of the backward.
        random: the arrays are independent random numbers, for which a tighter budget holds (definition/accuracy.py).
    """
    problem, arrays = describe(arguments)
    parts = sample(problem, arrays, backward=dout is not None)
    if dout is None:
        return accuracy.expected_forward(problem, arrays, parts, random=random)
    do, dl = widen(to_numpy(dout), problem.dtype), None if dlse is None else to_numpy(dlse).astype(np.float64)
    return accuracy.expected_backward(problem, arrays, do, dl, parts, random=random)


def sample(problem: Problem, arrays: Mapping[str, Any], *, backward: bool) -> list[Part] | None:
    """Choose the parts of a large problem that are compared; None stands for all of a small one."""
    found = list(sequences(problem, {name: arrays.get(name) for name in TABLES}))
    scores = problem.nheads * sum(s.n_q * s.n_k for s in found)
    keys = problem.nheads_kv * sum(s.n_k for s in found) * (problem.head_dim + problem.head_dim_v)
    if scores <= ALL_SCORES and keys <= ALL_KEYS:
        return None
    return list(_heads(problem, found) if backward else _rows(problem, found))


def _rows(problem: Problem, found: list[Sequence]) -> Iterator[Part]:
    """The first, a middle and the last head of as many sequences: their first row, their last, and some others."""
    rng = np.random.default_rng(0)
    for b in _some(len(found)):
        n_q = found[b].n_q
        for h in _some(problem.nheads):
            rows = np.arange(n_q)
            if n_q > ROWS:
                rows = np.unique(np.concatenate([[0, n_q - 1], rng.integers(0, n_q, ROWS)]))
            yield Part(b, h, rows)


def _heads(problem: Problem, found: list[Sequence]) -> Iterator[Part]:
    """All query heads of the first key head of the first sequence, and of the last of the last."""
    for b, h_kv in dict.fromkeys([(0, 0), (len(found) - 1, problem.nheads_kv - 1)]):
        step = max(1, SCORES // max(1, found[b].n_k))
        for h in range(h_kv * problem.group, (h_kv + 1) * problem.group):
            for start in range(0, found[b].n_q, step):
                yield Part(b, h, np.arange(start, min(found[b].n_q, start + step)))


def _some(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})
