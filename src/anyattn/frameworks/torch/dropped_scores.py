"""Matrix of probabilities and dropped entries that flash_attn calls S_dmask and returns for its tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...definition import reference
from ...definition.inputs import Inputs, flatten
from ...definition.options import Options
from ...definition.passes import FORWARD
from ...definition.problem import described
from ...definition.validate import make_problem
from . import functional, ops
from .adapter import adapter


def round_multiple(x: int, m: int) -> int:
    """Return the smallest multiple of m that is at least x."""
    return (x + m - 1) // m * m


def dropped_scores(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> Tensor:
    """Return (batch, nheads, seqlen_q, seqlen_k), both lengths rounded up to a multiple of 128, in q's dtype.

    Entries are exp(s - row maximum) for visible keys, negative if dropped, and 0 elsewhere. They are computed head by
    head from the definition in float64, which is slow for large matrices.
    """
    q, k, v, extras = functional.detach(functional.prepare(inputs, seed))
    scores: Tensor = _operator(q, k, v, *extras, *options, backend or "")
    return scores


def _empty(inputs: Inputs, options: Options) -> Tensor:
    """Return a result filled with 0."""
    q, k, starts = inputs.q, inputs.k, inputs.extras.cu_seqlens_q
    batch, rows = q.shape[:2] if starts is None else (starts.shape[0] - 1, options.max_seqlen_q)
    keys = k.shape[1] if starts is None else options.max_seqlen_k
    empty: Tensor = q.new_zeros((batch, q.shape[-2], round_multiple(rows, 128), round_multiple(keys, 128)))
    return empty


def _dropped_scores(*arguments: Any) -> Tensor:
    """Compute the matrix in an operator with the arguments of `anyattn::forward`, because traces cannot read values."""
    inputs, options, _ = ops.forward_arguments(arguments)
    scores = _empty(inputs, options)
    arrays = flatten(ops.contiguous_inputs(inputs))
    problem = make_problem(described(FORWARD.inputs, arrays, adapter.describe), options)
    views = described(FORWARD.inputs, arrays, adapter.numpy)
    for head in reference.heads(problem, views):
        top = head.s.max(axis=1, initial=-np.inf, keepdims=True)
        weights = np.exp(head.s - np.where(np.isfinite(top), top, 0.0))
        n_q, n_k = weights.shape
        scores[head.sequence.number, head.h, :n_q, :n_k] = torch.from_numpy(np.where(head.d == 0, -weights, weights))
    return scores


def _fake(*arguments: Any) -> Tensor:
    inputs, options, _ = ops.forward_arguments(arguments)
    return _empty(inputs, options)


_arguments = ops.schema(FORWARD).removeprefix("forward").rpartition(" -> ")[0]
ops.library.define(f"dropped_scores{_arguments} -> Tensor")
ops.library.impl("dropped_scores", _dropped_scores, "CompositeExplicitAutograd")
torch.library.register_fake(f"{ops.NAMESPACE}::dropped_scores", _fake, lib=ops.library)
_operator = ops.operators.dropped_scores.default
