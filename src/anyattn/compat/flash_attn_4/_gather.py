"""flash_attn 4's gather_kv_indices as lists of key slots."""

from __future__ import annotations

import torch
from torch import Tensor

from .._flash_attn_common.calls import rows_of


def key_lists(
    indices: Tensor,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    """Return kv_indices, in which entries outside a query's own sequence are no keys, as upstream.

    Args:
        indices: integers (batch, seqlen_q, n), or packed (total_q, n).
        q: queries of the call.
        k: keys of the call.
        cu_seqlens_q: (batch + 1,) of packed queries, or None.
        cu_seqlens_k: (batch + 1,) of packed keys, or None.
        block_table: pages of the call, or None.

    Raises:
        NotImplementedError: block_table is given, for which upstream defines no meaning.
        ValueError, TypeError: indices has another shape or dtype.
    """
    if block_table is not None:
        raise NotImplementedError(
            "page_table cannot be combined with gather_kv_indices, as upstream. "
            "Pass kv_indices and block_table to anyattn.attention_varlen instead."
        )
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"gather_kv_indices must be a tensor of int32 or int64, got {found}.")
    if indices.ndim < 2 or indices.shape[:-1] != q.shape[:-2]:
        layout = "(batch, seqlen_q, n)" if cu_seqlens_q is None else "(total_q, n)"
        raise ValueError(
            f"gather_kv_indices must have shape {layout}, got {tuple(indices.shape)} for q {tuple(q.shape)}."
        )
    limit = _slots(q, k, cu_seqlens_q, cu_seqlens_k)
    return indices.masked_fill((indices < 0) | (indices >= limit), -1)


def _slots(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor | int:
    """Return the key slots of each query's sequence, to compare with lists."""
    if cu_seqlens_k is None:
        return k.shape[1]
    lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    if cu_seqlens_q is None:
        return lengths[:, None, None]
    return lengths[rows_of(cu_seqlens_q, q.shape[0])[0], None]
