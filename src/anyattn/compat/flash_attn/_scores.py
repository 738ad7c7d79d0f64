"""S_dmask: the matrix of scores and dropped entries that flash_attn returns to its tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...definition import reference
from ...definition.arguments import explicit
from ...definition.problem import INPUTS, Options, make_problem
from ...frameworks.torch import functional, ops
from ...frameworks.torch.adapter import adapter
from ..calls import Bounds, within


def round_multiple(x: int, m: int) -> int:
    """The smallest multiple of m that is not below x."""
    return (x + m - 1) // m * m


def dropped_scores(q: Tensor, k: Tensor, v: Tensor, *, bounds: Bounds, **arguments: Any) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k), both lengths rounded up to 128, in q's dtype.

    exp(s - maximum of the row) where a row sees a key, negative where dropout drops it, 0 elsewhere. Computed head by
    head from the definition itself, in float64: as slow as the matrix is large.
    """
    arrays, options, seed, backend = explicit(q, k, v, **arguments)
    options = within(bounds, options)
    prepared = [None if x is None else x.detach() for x in functional.prepare(arrays, seed)]
    scores: Tensor = torch.ops.anyattn.dropped_scores(*prepared, *options, backend or "")
    return scores


def _empty(arrays: ops.Arrays, options: Options) -> Tensor:
    """The result, 0."""
    given = dict(zip(INPUTS, arrays, strict=True))
    q, k, starts = given["q"], given["k"], given["cu_seqlens_q"]
    batch, rows = q.shape[:2] if starts is None else (starts.shape[0] - 1, options.max_seqlen_q)
    keys = k.shape[1] if starts is None else options.max_seqlen_k
    empty: Tensor = q.new_zeros((batch, q.shape[-2], round_multiple(rows, 128), round_multiple(keys, 128)))
    return empty


def _dropped_scores(*arguments: Any) -> Tensor:
    """An operator, with the arguments of `anyattn::forward`, since what is traced cannot look at values."""
    arrays, options, _ = ops.forward_arguments(arguments)
    scores = _empty(arrays, options)
    given = {name: x for name, x in zip(INPUTS, ops.contiguous_rows(arrays), strict=True) if x is not None}
    problem = make_problem({name: adapter.describe(x) for name, x in given.items()}, options)
    for head in reference.heads(problem, {name: adapter.numpy(x) for name, x in given.items()}):
        top = head.s.max(axis=1, initial=-np.inf, keepdims=True)
        weights = np.exp(head.s - np.where(np.isfinite(top), top, 0.0))
        n_q, n_k = weights.shape
        scores[head.sequence.number, head.h, :n_q, :n_k] = torch.from_numpy(np.where(head.d == 0, -weights, weights))
    return scores


def _fake(*arguments: Any) -> Tensor:
    return _empty(*ops.forward_arguments(arguments)[:2])


_inputs = str(ops.forward._schema).removeprefix("anyattn::forward").rpartition(" -> ")[0]
library = torch.library.Library("anyattn", "FRAGMENT")
library.define(f"dropped_scores{_inputs} -> Tensor")
library.impl("dropped_scores", _dropped_scores, "CompositeExplicitAutograd")
torch.library.register_fake("anyattn::dropped_scores", _fake, lib=library)
