"""flash_attn 4's functions, with its signatures and results, on every backend of anyattn.

As in flash_attn 2 and 3 (see their modules here), with these differences:

* Every function returns (out, lse). lse is None unless return_lse asks for it or an input needs a gradient; float32,
  natural logarithm, -inf for a row that sees no key (with a sink: the sink). With return_lse gradients flow through it.
  With qv its heads are last, as upstream: (batch, seqlen_q, nheads) or (total_q, nheads).
* window_size: None means unbounded, and so do two negative numbers; one negative number moves the edge past the row.
* learnable_sink (nheads,): one more logit in each denominator; it has a gradient.
* qv (..., nheads, head_dim_v): scores are scale * (q k^T + qv v^T), softmax_scale by default
  (head_dim + head_dim_v) ** -0.5; it has a gradient. k is copied for it.
* num_splits, pack_gqa, min_seqlen_k, scheduler_metadata, seqlen_k_per_split and disable_scheduler_metadata only steer a
  GPU's speed: accepted, without effect on results.
* gather_kv_indices (batch, seqlen_q, n) or (total_q, n): each query attends only to the key slots of its own sequence
  that are in its list and that the other masks leave visible. An entry outside the sequence is no key; a slot that is
  listed twice counts once. With or without qv, for any number of heads and entries, with gradients. With page_table it
  raises NotImplementedError.
* block_sparse_tensors: a query attends to the keys of the listed blocks, as far as causal and window_size allow. It
  needs a block_size, and becomes a boolean mask of a byte per pair of a query and a key, of one head if the lists are
  of one. Gradients follow from it; block_sparse_tensors_bwd may only list the same blocks.
* score_mod, score_mod_bwd, mask_mod, their aux_tensors and aux_scalars, and block_sparse_tensors of packed
  sequences or without a block_size raise NotImplementedError with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._flash_attn_common.calls import only_speed
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
    """(out, lse) of q (batch, seqlen_q, nheads, head_dim) and k, v (batch, seqlen_k, nheads_kv, ...).

    The arguments are those of the module's docstring. lse is (batch, nheads, seqlen_q) or None.

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
    only_speed(num_splits, 256)
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
    """(out, lse) over sequences of different lengths.

    q is packed (total_q, nheads, head_dim) with cu_seqlens_q, else (batch, seqlen_q, nheads, head_dim); k and v are
    packed with cu_seqlens_k, pages (num_pages, page_size, nheads_kv, ...) with page_table (batch, max_pages), else
    dense. seqused_q, seqused_k: int32 (batch,), rows and keys in use; other rows are 0. max_seqlen_q, max_seqlen_k: at
    least the longest length (ValueError otherwise), or None. lse is (nheads, total_q) or (batch, nheads, seqlen_q).

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
    only_speed(num_splits, 256)
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
    """(out, lse) over all keys from those over parts, as flash_attn 3's; lse is None with return_lse=False.

    cu_seqlens: int32 (batch + 1,), of a packed out_partial; seqused: (batch,), rows in use. Others are 0 and -inf.
    virtual_batch_idx, an order of work, has no effect on results. No gradients.

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
    """A tensor for scheduler_metadata. Nothing is scheduled ahead here: it is all 0.

    AssertionError, as upstream, without any of cu_seqlens_q, cu_seqlens_k, seqused_q and seqused_k.

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
