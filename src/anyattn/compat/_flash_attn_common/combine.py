"""Merging of any number of partial results of attention over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import rows_of, store


def combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge (num_splits, ..., nheads, head_dim) and (num_splits, ..., nheads). Rows that are not `used`: 0 and -inf.

    lse = log sum_s exp(lse_s)      out = sum_s exp(lse_s - lse) out_s      a split with lse_s = -inf is not read
    """
    if out_partial.ndim not in (4, 5) or lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            "out_partial must be (num_splits, batch, seqlen, nheads, head_dim) or (num_splits, total, nheads, head_dim)"
            ", and lse_partial must have that shape without head_dim, "
            f"got {tuple(out_partial.shape)} and {tuple(lse_partial.shape)}."
        )
    with torch.no_grad():
        if used is not None:
            lse_partial = lse_partial.masked_fill(~used.unsqueeze(-1), -torch.inf)
        lse = torch.logsumexp(lse_partial.to(torch.promote_types(lse_partial.dtype, torch.float32)), dim=0)
        weights = torch.exp(lse_partial - lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
        merged = torch.where(weights > 0, weights * out_partial, 0.0).sum(0)
        return store(out, merged.to(out_dtype or out_partial.dtype)), lse


def used_rows(out_partial: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> Tensor | None:
    """Return which rows belong to a sequence and are in use, (batch, seqlen) or (total,); None: all."""
    packed = out_partial.ndim == 4
    if cu_seqlens is not None and not packed:
        raise ValueError(
            f"out_partial must be (num_splits, total, nheads, head_dim) with cu_seqlens, got {out_partial.ndim}-D."
        )
    if cu_seqlens is not None:
        sequence, row, inside = rows_of(cu_seqlens, out_partial.shape[1])
        return inside if seqused is None else inside & (row < seqused[sequence])
    if seqused is None:
        return None
    if packed:
        raise ValueError("cu_seqlens must be passed with seqused for a packed out_partial, got None.")
    return torch.arange(out_partial.shape[2], device=seqused.device) < seqused[:, None]
