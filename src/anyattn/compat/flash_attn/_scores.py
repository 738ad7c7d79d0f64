"""S_dmask: the matrix of scores and dropped entries that flash_attn returns to its tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import reference
from ...arguments import explicit
from ...frameworks.torch import functional, ops
from ...frameworks.torch.adapter import adapter
from ...problem import INPUTS, make_problem
from ..calls import Bounds


def round_multiple(x: int, m: int) -> int:
    """The smallest multiple of m that is not below x."""
    return (x + m - 1) // m * m


@torch.compiler.disable
def dropped_scores(q: Tensor, k: Tensor, v: Tensor, *, bounds: Bounds, **arguments: Any) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k), both lengths rounded up to 128, in q's dtype.

    exp(s - maximum of the row) where a row sees a key, negative where dropout drops it, 0 elsewhere. Computed head by
    head from the definition itself, in float64: as slow as the matrix is large.
    """
    arrays, options, seed, _ = explicit(q, k, v, **arguments)
    options = options._replace(left=bounds[0], right=bounds[1])
    prepared = [None if x is None else x.detach() for x in ops.contiguous_rows(functional.prepare(arrays, seed))]
    given = {name: x for name, x in zip(INPUTS, prepared, strict=True) if x is not None}
    problem = make_problem({name: adapter.describe(x) for name, x in given.items()}, options)
    lengths = (options.max_seqlen_q or problem.seqlen_q, options.max_seqlen_k or problem.seqlen_k)
    rows, keys = (round_multiple(length, 128) for length in lengths)
    scores = q.new_zeros((problem.batch, problem.nheads, rows, keys))
    for head in reference.heads(problem, {name: adapter.numpy(x) for name, x in given.items()}):
        top = head.s.max(axis=1, initial=-np.inf, keepdims=True)
        weights = np.exp(head.s - np.where(np.isfinite(top), top, 0.0))
        n_q, n_k = weights.shape
        scores[head.sequence.index, head.h, :n_q, :n_k] = torch.from_numpy(np.where(head.d == 0, -weights, weights))
    return scores
