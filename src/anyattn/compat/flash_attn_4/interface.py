"""Functions of flash_attn 4, with its signatures and results, on every backend of anyattn.

They differ from flash_attn 2 and 3 (see their modules) as follows:

* Every function returns (out, lse). lse is None unless return_lse is set or an input requires a gradient. It is
  float32, the natural logarithm, -inf for a query without visible keys (the sink's value with a sink). With qv its
  heads are last, as upstream: (batch, seqlen_q, nheads) or (total_q, nheads).
* qv (..., nheads, head_dim_v): scores are scale * (q k^T + qv v^T). k is copied for it.
* num_splits, pack_gqa, min_seqlen_k, scheduler_metadata, seqlen_k_per_split and disable_scheduler_metadata are accepted
  and do not affect results.
* gather_kv_indices: each query attends only to the key slots of its own sequence that are in its list and that the
  other masks leave visible. An entry outside the sequence is no key, and a slot that is listed twice counts once. It
  works with or without qv, for any number of heads and entries, with gradients. With page_table it raises
  NotImplementedError.
* block_sparse_tensors: a query attends to the keys of the listed blocks, as far as causal and window_size allow. The
  lists need a block_size. They become a boolean mask with one byte per pair of query and key (for one head, if the
  lists have one head), and gradients follow from it. block_sparse_tensors_bwd must list the same blocks.
* score_mod, score_mod_bwd, mask_mod, their aux_tensors and aux_scalars, and block_sparse_tensors of packed sequences or
  without a block_size raise NotImplementedError with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._flash_attn_common.calls import check_num_splits
from .._flash_attn_common.combine import combine, used_rows
from ._private import Result, _flash_attn_bwd, _flash_attn_fwd, attend_4, check_gather, refuse
from .block_sparsity import check_same_blocks, sparse_mask


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> Result:
    """Compute attention of q to k and v.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_kv, head_dim).
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        qv: (..., nheads, head_dim_v) in q's layout, for absorbed MLA: scores are scale * (q k^T + qv v^T). It has a
            gradient.
        gather_kv_indices: (batch, seqlen_q, n) or (total_q, n): key slots of the query's own sequence that it attends
            to.
        softmax_scale: any finite number; default head_dim ** -0.5, or (head_dim + head_dim_v) ** -0.5 with qv.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive; None or two negative numbers: unbounded. One negative number moves that
            edge beyond the position.
        learnable_sink: (nheads,), one additional logit in each softmax denominator. It has a gradient.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        num_splits: a hint for GPUs; it does not affect results.
        pack_gqa: a hint for GPUs; it does not affect results.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        score_mod: not supported.
        score_mod_bwd: not supported.
        mask_mod: not supported.
        aux_tensors: not supported.
        aux_scalars: not supported.
        block_sparse_tensors: blocks of keys that each block of queries attends to; needs a block_size.
        block_sparse_tensors_bwd: the same blocks, listed by blocks of keys.
        return_lse: also return lse. Gradients then flow through it.
        gather_bwd_recompute_p: a hint for GPUs; needs gather_kv_indices.
        gather_bwd_token_chunk: a hint for GPUs; needs gather_kv_indices.

    Returns:
        (out, lse): out (batch, seqlen_q, nheads, head_dim_v), lse (batch, nheads, seqlen_q) or None.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: an argument is not supported; the message gives the reason.

    >>> import torch
    >>> from anyattn.compat.flash_attn_4 import flash_attn_func
    >>> q, k = torch.ones(1, 4, 4, 8), torch.ones(1, 6, 2, 8)
    >>> out, lse = flash_attn_func(q, k, k, causal=True)
    >>> out.shape, lse
    (torch.Size([1, 4, 4, 8]), None)
    """
    refuse(
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
    )
    check_gather(gather_kv_indices, gather_bwd_recompute_p, gather_bwd_token_chunk)
    check_num_splits(num_splits, 256)
    options: dict[str, Any] = {"scale": softmax_scale, "softcap": softcap, "sink": learnable_sink}
    options.update({"deterministic": deterministic, "gather_kv_indices": gather_kv_indices})
    options["mask"] = sparse_mask(block_sparse_tensors, q, k, (qv,))
    check_same_blocks(options["mask"], block_sparse_tensors_bwd, q, k)
    return attend_4(q, k, v, qv, causal, window_size, return_lse, **options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> Result:
    """Compute attention over sequences of different lengths, each of q, k and v packed or not.

    Args:
        q: (total_q, nheads, head_dim) with cu_seqlens_q, else (batch, seqlen_q, nheads, head_dim).
        k: (total_k, nheads_kv, head_dim) with cu_seqlens_k, pages (num_pages, page_size, nheads_kv, head_dim) with
            page_table, else (batch, seqlen_k, nheads_kv, head_dim).
        v: like k, with head_dim_v.
        qv: (..., nheads, head_dim_v) in q's layout, for absorbed MLA: scores are scale * (q k^T + qv v^T). It has a
            gradient.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k: int32 (batch + 1,), cumulative lengths of the key sequences.
        max_seqlen_q: at least the longest query length, or None; a smaller value raises ValueError.
        max_seqlen_k: at least the longest key length, or None; a smaller value raises ValueError.
        min_seqlen_k: a hint for GPUs; it does not affect results.
        seqused_q: int32 (batch,), number of queries in use per sequence; unused queries give 0.
        seqused_k: int32 (batch,), number of keys in use per sequence.
        gather_kv_indices: (batch, seqlen_q, n) or (total_q, n): key slots of the query's own sequence that it attends
            to.
        page_table: int32 (batch, max_pages), pages of each sequence, of any size.
        softmax_scale: any finite number; default head_dim ** -0.5, or (head_dim + head_dim_v) ** -0.5 with qv.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive; None or two negative numbers: unbounded. One negative number moves that
            edge beyond the position.
        learnable_sink: (nheads,), one additional logit in each softmax denominator. It has a gradient.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        num_splits: a hint for GPUs; it does not affect results.
        pack_gqa: a hint for GPUs; it does not affect results.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        score_mod: not supported.
        score_mod_bwd: not supported.
        mask_mod: not supported.
        block_sparse_tensors: blocks of keys that each block of queries attends to; needs a block_size.
        aux_tensors: not supported.
        aux_scalars: not supported.
        return_lse: also return lse. Gradients then flow through it.
        scheduler_metadata: it does not affect results.
        seqlen_k_per_split: a hint for GPUs; it does not affect results.
        disable_scheduler_metadata: it does not affect results.
        gather_bwd_recompute_p: a hint for GPUs; needs gather_kv_indices.
        gather_bwd_token_chunk: a hint for GPUs; needs gather_kv_indices.

    Returns:
        (out, lse): out in q's shape with head_dim_v, lse (nheads, total_q) or (batch, nheads, seqlen_q), or None.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: an argument is not supported; the message gives the reason.

    >>> import torch
    >>> from anyattn.compat.flash_attn_4 import flash_attn_varlen_func
    >>> x, cu_seqlens = torch.ones(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> out, lse = flash_attn_varlen_func(
    ...     x, x, x, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, return_lse=True
    ... )
    >>> out.shape, lse.shape
    (torch.Size([7, 2, 8]), torch.Size([2, 7]))
    """
    refuse(
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
    )
    check_gather(gather_kv_indices, gather_bwd_recompute_p, gather_bwd_token_chunk)
    check_num_splits(num_splits, 256)
    options: dict[str, Any] = {"scale": softmax_scale, "softcap": softcap, "sink": learnable_sink}
    options.update({"deterministic": deterministic, "gather_kv_indices": gather_kv_indices})
    options.update({"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "block_table": page_table})
    options.update({"seqused_q": seqused_q, "seqused_k": seqused_k})
    options.update({"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k})
    options["mask"] = sparse_mask(block_sparse_tensors, q, k, (qv, cu_seqlens_q, cu_seqlens_k), page_table)
    return attend_4(q, k, v, qv, causal, window_size, return_lse, **options)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> Result:
    """Combine results over disjoint sets of keys into the result over all keys. There are no gradients.

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, head_dim) or (num_splits, total, nheads, head_dim).
        lse_partial: out_partial's shape without head_dim, heads last.
        out: buffer for the result, or None.
        out_dtype: dtype of the result; default out_partial's dtype.
        cu_seqlens: int32 (batch + 1,), cumulative lengths of a packed out_partial.
        seqused: (batch,), number of queries in use; unused queries give 0 and -inf.
        virtual_batch_idx: an order of work; it does not affect results.
        return_lse: return lse instead of None.

    Returns:
        (out, lse), as flash_attn 3 returns them.

    >>> import torch
    >>> from anyattn.compat.flash_attn_4 import flash_attn_combine
    >>> out, lse = flash_attn_combine(torch.ones(3, 1, 4, 2, 8), torch.zeros(3, 1, 4, 2))
    >>> out.shape, lse[0, 0, 0]  # log 3
    (torch.Size([1, 4, 2, 8]), tensor(1.0986))
    """
    merged, lse = combine(out_partial, lse_partial, out, out_dtype, used_rows(out_partial, cu_seqlens, seqused))
    return merged, lse if return_lse else None


def get_scheduler_metadata(
    max_seqlen_q: int,
    max_seqlen_k: int,
    nheads: int,
    nheads_kv: int,
    headdim: int,
    num_splits: int,
    headdim_v: int | None = None,
    pack_gqa: int | None = None,
    causal: bool = False,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqlen_k_new: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqlen_k_per_split: int | None = None,
    _arch: int | None = None,
) -> Tensor:
    """Return a tensor for scheduler_metadata, all 0: anyattn needs no schedule.

    Args:
        max_seqlen_q: longest query length.
        max_seqlen_k: longest key length.
        nheads: number of query heads.
        nheads_kv: number of KV heads.
        headdim: head_dim of q and k.
        num_splits: a hint for GPUs.
        headdim_v: head_dim of v; default headdim.
        pack_gqa: a hint for GPUs.
        causal: the call is causal.
        window_size_left: left side of the window.
        window_size_right: right side of the window.
        seqlen_k_new: longest length of new keys.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k: int32 (batch + 1,), cumulative lengths of the key sequences.
        cu_seqlens_k_new: int32 (batch + 1,), cumulative lengths of packed new keys.
        seqused_q: int32 (batch,), number of queries in use per sequence; unused queries give 0.
        seqused_k: int32 (batch,), number of keys in use per sequence.
        leftpad_k: (batch,), first key in use.
        seqlen_k_per_split: a hint for GPUs.

    Returns:
        int32 (batch,).

    Raises:
        AssertionError: none of cu_seqlens_q, cu_seqlens_k, seqused_q and seqused_k is given.

    >>> import torch
    >>> from anyattn.compat.flash_attn_4 import get_scheduler_metadata
    >>> get_scheduler_metadata(1, 64, 4, 2, 64, 1, seqused_k=torch.tensor([3, 9], dtype=torch.int32))
    tensor([0, 0], dtype=torch.int32)
    """
    starts = [x[1:] for x in (cu_seqlens_q, cu_seqlens_k) if x is not None]
    lengths = [*starts, *(x for x in (seqused_q, seqused_k) if x is not None)]
    assert lengths, "get_scheduler_metadata requires at least one of cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k"
    return torch.zeros_like(lengths[0], dtype=torch.int32)


__all__ = [
    "_flash_attn_bwd",
    "_flash_attn_fwd",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
]
