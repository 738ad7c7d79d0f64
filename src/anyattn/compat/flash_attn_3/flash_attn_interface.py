"""Functions of flash_attn 3, with its signatures and results, on every backend of anyattn.

They differ from flash_attn 2 (see `anyattn.compat.flash_attn.flash_attn_interface`) as follows:

* softmax_lse is -inf for a query without visible keys. There is no ALiBi and no dropout.
* qv (..., nheads, head_dim_v): scores are scale * (q k^T + qv v^T), as in absorbed MLA. k is copied for it.
* q_descale, k_descale, v_descale (batch, nheads_kv): the values of q, k and v are x * descale. float8_e4m3fn inputs are
  computed in float32 and give a bfloat16 out without gradients. Upstream ignores descales for other dtypes; here they
  apply to all dtypes.
* attention_chunk has gradients, unlike upstream.
* num_splits, pack_gqa, sm_margin and scheduler_metadata are accepted and do not affect results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...frameworks.torch_tools import dense
from ...scalars import integer, real
from .._flash_attn_common.calls import check_num_splits, window_bounds
from .._flash_attn_common.combine import combine
from .._flash_attn_common.inputs import attend_extended
from ._with_kvcache import flash_attn_with_kvcache


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Compute attention of q to k and v.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_kv, head_dim).
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        softmax_scale: any finite number; default head_dim ** -0.5, or (head_dim + head_dim_v) ** -0.5 with qv.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        qv: (..., nheads, head_dim_v) in q's layout, for absorbed MLA: scores are scale * (q k^T + qv v^T). It has a
            gradient.
        q_descale: (batch, nheads_kv), factor of q.
        k_descale: (batch, nheads_kv), factor of k.
        v_descale: (batch, nheads_kv), factor of v.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        attention_chunk: number of positions in a chunk that queries attend within; 0: off.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        num_splits: a hint for GPUs; it does not affect results.
        pack_gqa: a hint for GPUs; it does not affect results.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        sm_margin: a hint for GPUs; it does not affect results.
        return_attn_probs: also return softmax_lse.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v). With return_attn_probs: (out, softmax_lse), softmax_lse float32
        (batch, nheads, seqlen_q), -inf for queries without visible keys.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_func
    >>> q, k = torch.ones(1, 4, 4, 8), torch.ones(1, 6, 2, 8)
    >>> flash_attn_func(q, k, k, causal=True).shape
    torch.Size([1, 4, 4, 8])
    """
    check_num_splits(num_splits, 256)
    out, lse = attend_extended(
        q,
        k,
        v,
        qv=qv,
        descales=(q_descale, k_descale, v_descale),
        scale=softmax_scale,
        bounds=window_bounds(window_size, causal),
        chunk=attention_chunk,
        softcap=max(real("softcap", softcap), 0.0),
        deterministic=deterministic,
    )
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Compute attention over sequences that are concatenated without padding.

    Args:
        q: (total_q, nheads, head_dim).
        k: (total_k, nheads_kv, head_dim).
        v: (total_k, nheads_kv, head_dim_v).
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k: int32 (batch + 1,), cumulative lengths of the key sequences.
        max_seqlen_q: at least the longest query length; a smaller value raises ValueError.
        max_seqlen_k: at least the longest key length; a smaller value raises ValueError.
        seqused_q: int32 (batch,), number of queries in use per sequence; unused queries give 0.
        seqused_k: int32 (batch,), number of keys in use per sequence.
        softmax_scale: any finite number; default head_dim ** -0.5, or (head_dim + head_dim_v) ** -0.5 with qv.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        qv: (..., nheads, head_dim_v) in q's layout, for absorbed MLA: scores are scale * (q k^T + qv v^T). It has a
            gradient.
        q_descale: (batch, nheads_kv), factor of q.
        k_descale: (batch, nheads_kv), factor of k.
        v_descale: (batch, nheads_kv), factor of v.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        attention_chunk: number of positions in a chunk that queries attend within; 0: off.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        num_splits: a hint for GPUs; it does not affect results.
        pack_gqa: a hint for GPUs; it does not affect results.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        sm_margin: a hint for GPUs; it does not affect results.
        return_attn_probs: also return softmax_lse.

    Returns:
        out (total_q, nheads, head_dim_v). With return_attn_probs: (out, softmax_lse (nheads, total_q)).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_varlen_func
    >>> x, cu_seqlens = torch.ones(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
    torch.Size([7, 2, 8])
    """
    check_num_splits(num_splits, 256)
    out, lse = attend_extended(
        q,
        k,
        v,
        qv=qv,
        descales=(q_descale, k_descale, v_descale),
        scale=softmax_scale,
        bounds=window_bounds(window_size, causal),
        chunk=attention_chunk,
        softcap=max(real("softcap", softcap), 0.0),
        deterministic=deterministic,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=integer("max_seqlen_q", max_seqlen_q),
        max_seqlen_k=integer("max_seqlen_k", max_seqlen_k),
        seqused_q=seqused_q,
        seqused_k=seqused_k,
    )
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Compute `flash_attn_func` for packed queries, keys and values, used as views.

    Args:
        qkv: (batch, seqlen, 3, nheads, head_dim); with num_heads_q, (batch, seqlen, num_heads_q + 2 nheads_kv,
            head_dim).
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        q_descale: (batch, nheads_kv), factor of q.
        k_descale: (batch, nheads_kv), factor of k.
        v_descale: (batch, nheads_kv), factor of v.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        attention_chunk: number of positions in a chunk that queries attend within; 0: off.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        num_heads_q: number of query heads, if the heads are packed in one dimension.
        sm_margin: a hint for GPUs; it does not affect results.
        return_attn_probs: also return softmax_lse.

    Returns:
        out (batch, seqlen, nheads, head_dim). With return_attn_probs: (out, softmax_lse), softmax_lse float32 (batch,
        nheads, seqlen), -inf for queries without visible keys.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.ones(1, 4, 8, 16), num_heads_q=4).shape
    torch.Size([1, 4, 4, 16])
    """
    qkv = dense("qkv", qkv)
    num_heads_q = None if num_heads_q is None else integer("num_heads_q", num_heads_q)
    nheads_kv, odd = divmod(qkv.shape[2] - (num_heads_q or 0), 2)
    if qkv.ndim == 5 and qkv.shape[2] == 3 and num_heads_q in (None, qkv.shape[3]):
        q, k, v = qkv.unbind(2)
    elif qkv.ndim == 4 and num_heads_q is not None and nheads_kv > 0 and not odd:
        q, k, v = qkv.split([num_heads_q, nheads_kv, nheads_kv], dim=2)
    else:
        raise ValueError(
            "qkv must be (batch, seqlen, 3, nheads, head_dim), or (batch, seqlen, num_heads_q + 2 nheads_kv, head_dim) "
            f"with num_heads_q, got {tuple(qkv.shape)}, num_heads_q {num_heads_q}."
        )
    options = (softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap)
    return flash_attn_func(
        q, k, v, *options, deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs
    )


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Combine results over disjoint sets of keys into the result over all keys. There are no gradients.

        lse = log sum_s exp(lse_s)      out = sum_s exp(lse_s - lse) out_s

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, head_dim) or (num_splits, total, nheads, head_dim).
        lse_partial: out_partial's shape without head_dim, heads last.
        out: buffer for the result, or None.
        out_dtype: dtype of the result; default out_partial's dtype.

    Returns:
        out, and lse in float32, (batch, seqlen, nheads) or (total, nheads), -inf if every part is.

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_combine
    >>> out, lse = flash_attn_combine(torch.ones(3, 1, 4, 2, 8), torch.zeros(3, 1, 4, 2))
    >>> out.shape, lse[0, 0, 0]  # log 3
    (torch.Size([1, 4, 2, 8]), tensor(1.0986))
    """
    return combine(out_partial, lse_partial, out, out_dtype)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """Return a tensor for `flash_attn_with_kvcache(scheduler_metadata=...)`, all 0: anyattn needs no schedule.

    Args:
        batch_size: number of sequences.
        max_seqlen_q: longest query length.
        max_seqlen_k: longest key length.
        num_heads_q: number of query heads.
        num_heads_kv: number of KV heads.
        headdim: head_dim of q and k.
        cache_seqlens: int32 (batch,), number of keys in the cache.
        qkv_dtype: dtype of q, k and v.
        headdim_v: head_dim of v; default headdim.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k_new: int32 (batch + 1,), cumulative lengths of packed new keys.
        cache_leftpad: (batch,), first slot in use.
        page_size: size of a page; None: not paged.
        max_seqlen_k_new: longest length of new keys.
        causal: the call is causal.
        window_size: (left, right) of the call.
        attention_chunk: chunk of the call.
        has_softcap: the call has a softcap.
        num_splits: a hint for GPUs.
        pack_gqa: a hint for GPUs.
        sm_margin: a hint for GPUs.

    Returns:
        int32 (batch_size + 1,).

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import get_scheduler_metadata
    >>> get_scheduler_metadata(2, 1, 64, 4, 2, 64, torch.tensor([3, 9], dtype=torch.int32))
    tensor([0, 0, 0], dtype=torch.int32)
    """
    return torch.zeros(batch_size + 1, dtype=torch.int32, device=cache_seqlens.device)


__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
