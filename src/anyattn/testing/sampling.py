"""Checks of problems that are too large to compute in float64: a part is computed exactly, with the usual budgets.

The parts are always the same. For the forward pass they are some queries of some heads. For the backward pass they are
complete heads, because the gradients of a key need every query.
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

ALL_SCORES = 2**21  # scores of all heads; a larger problem is compared in parts
ALL_KEYS = 2**24  # values of k and v; a larger problem is compared in parts
ROWS = 24  # queries of a head
SCORES = 2**20  # scores of one part of the backward pass, which limits the memory


def expected_results(
    arguments: Mapping[str, Any], dout: Any = None, dlse: Any = None, *, random: bool = False
) -> dict[str, Expected]:
    """Compute the expected results of a call: all of them or, for a large problem, a sample.

    Args:
        arguments: arguments of `attention_forward`, on NumPy arrays or torch tensors.
        dout: gradient of out, for the results of the backward pass.
        dlse: gradient of lse, for the results of the backward pass.
        random: the arrays are independent random numbers, so a tighter budget holds (definition/accuracy.py).
    """
    problem, arrays = describe(arguments)
    parts = sample(problem, arrays, backward=dout is not None)
    if dout is None:
        return accuracy.expected_forward(problem, arrays, parts, random=random)
    do, dl = widen(to_numpy(dout), problem.dtype), None if dlse is None else to_numpy(dlse).astype(np.float64)
    return accuracy.expected_backward(problem, arrays, do, dl, parts, random=random)


def sample(problem: Problem, arrays: Mapping[str, Any], *, backward: bool) -> list[Part] | None:
    """Return the compared parts of a large problem; None for a small problem, which is compared completely."""
    found = list(sequences(problem, {name: arrays.get(name) for name in TABLES}))
    scores = problem.nheads * sum(s.n_q * s.n_k for s in found)
    keys = problem.nheads_kv * sum(s.n_k for s in found) * (problem.head_dim + problem.head_dim_v)
    if scores <= ALL_SCORES and keys <= ALL_KEYS:
        return None
    return list(_heads(problem, found) if backward else _rows(problem, found))


def _rows(problem: Problem, found: list[Sequence]) -> Iterator[Part]:
    """Yield some queries, the first and the last included, of three heads of three sequences."""
    rng = np.random.default_rng(0)
    for b in _some(len(found)):
        n_q = found[b].n_q
        for h in _some(problem.nheads):
            rows = np.arange(n_q)
            if n_q > ROWS:
                rows = np.unique(np.concatenate([[0, n_q - 1], rng.integers(0, n_q, ROWS)]))
            yield Part(b, h, rows)


def _heads(problem: Problem, found: list[Sequence]) -> Iterator[Part]:
    """Yield all query heads of the first KV head of the first sequence, and of the last one of the last sequence."""
    for b, h_kv in dict.fromkeys([(0, 0), (len(found) - 1, problem.nheads_kv - 1)]):
        step = max(1, SCORES // max(1, found[b].n_k))
        for h in range(h_kv * problem.group, (h_kv + 1) * problem.group):
            for start in range(0, found[b].n_q, step):
                yield Part(b, h, np.arange(start, min(found[b].n_q, start + step)))


def _some(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})
