"""Attention in torch operations, with all scores in memory. Frameworks and other packages' APIs are compared with it.

test_torch_gradients compares it with the package, and test_reference compares the package with the oracle.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyattn.definition import philox


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    chunk: int = 0,
    alignment: str = "bottom-right",
    offset: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    kv_indices: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of q, k and v (batch, seqlen, nheads, head_dim); the arguments are those of `attention`."""
    rows, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias
    if offset is None:
        offset = keys - rows if alignment == "bottom-right" else 0
    p, c = (torch.arange(rows) + offset)[:, None], torch.arange(keys)[None]
    if alibi_slopes is not None:
        s = s - alibi_slopes.reshape(-1, q.shape[2], 1, 1) * (p - c).abs()
    left, right = window or (None, None)
    right = 0 if causal else right
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen = seen if left is None else seen & (c >= p - left)
    seen = seen if right is None else seen & (c <= p + right)
    seen = seen & (c // chunk == p.div(chunk, rounding_mode="floor")) if chunk else seen
    if kv_indices is not None:
        lists = kv_indices.repeat_interleave(group, 1) if kv_indices.ndim == 4 else kv_indices[:, None]
        seen = seen & (lists.unsqueeze(-1) == torch.arange(keys)).any(-2)
    s = s.masked_fill(~(seen if mask is None else seen & mask), -torch.inf)
    logits = s if sink is None else torch.cat((s, sink.reshape(1, -1, 1, 1).expand(*s.shape[:3], 1)), -1)
    some = logits.isfinite().any(-1)
    safe = torch.where(some.unsqueeze(-1), logits, 0.0)
    lse = torch.where(some, safe.logsumexp(-1), -torch.inf)
    weights = torch.where(some.unsqueeze(-1), logits.softmax(-1) if bool(some.all()) else safe.softmax(-1), 0.0)
    if dropout_p:
        weights = weights * kept(weights.shape, dropout_p, seed) * philox.keep_scale(dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights[..., :keys], v), lse


def plain_output(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Return the output of `plain_attention` alone."""
    return plain_attention(q, k, v, **options)[0]


def kept(shape: tuple[int, ...], dropout_p: float, seed: int) -> Tensor:
    """Return which probabilities (batch, nheads, seqlen_q, seqlen_k) dropout keeps."""
    batch, nheads, rows, keys = shape
    state, i, j = np.array([seed, 0]), np.arange(rows), np.arange(keys)
    heads = [philox.keep(state, dropout_p, head, i, j) for head in range(batch * nheads)]
    return torch.from_numpy(np.stack(heads)).reshape(shape)
