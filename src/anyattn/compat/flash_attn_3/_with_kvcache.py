"""Function of flash_attn 3 for a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...decoding import attention_with_kvcache
from ...frameworks.torch_tools import dense
from ...scalars import integer, real
from .._flash_attn_common.calls import check_num_splits, window_bounds
from .._flash_attn_common.inputs import FP8, attend_extended
from ._kvcache import NewKeys, Rotary


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append k and v to a KV cache in place, then attend to the cache. There are no gradients.

    Args:
        q: (batch, seqlen_q, nheads, head_dim); with cu_seqlens_q, (total_q, nheads, head_dim).
        k_cache: (entries, slots, nheads_kv, head_dim); with page_table, pages (num_pages, page_size, nheads_kv,
            head_dim) of any size.
        v_cache: like k_cache, with head_dim_v.
        k: (batch, seqlen_new, nheads_kv, head_dim) or, with cu_seqlens_k_new, (total_new, nheads_kv, head_dim): new
            keys, rotated and written after the keys in the cache.
        v: like k, with head_dim_v: new values, written unchanged.
        qv: (..., nheads, head_dim_v) in q's layout, for absorbed MLA: scores are scale * (q k^T + qv v^T). It has a
            gradient.
        rotary_cos: (positions, rotary_dim / 2). New key t is rotated at cache_seqlens + t; query i at cache_seqlens + i
            if causal or windowed, else at cache_seqlens.
        rotary_sin: (positions, rotary_dim / 2).
        cache_seqlens: number of keys in the cache before the call, an int or int32 (batch,); None: all slots.
        cache_batch_idx: (batch,), cache entry of each sequence; not combined with page_table.
        cache_leftpad: (batch,), first slot in use.
        page_table: int32 (batch, max_pages), pages of each sequence.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of packed queries.
        cu_seqlens_k_new: int32 (batch + 1,), cumulative lengths of packed new keys.
        max_seqlen_q: longest length in cu_seqlens_q.
        rotary_seqlens: (batch,), positions at which the rotation of q and k starts, instead of cache_seqlens.
        q_descale: (batch, nheads_kv), factor of q.
        k_descale: (batch, nheads_kv), factor of k.
        v_descale: (batch, nheads_kv), factor of v.
        softmax_scale: any finite number; default head_dim ** -0.5, or (head_dim + head_dim_v) ** -0.5 with qv.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        attention_chunk: number of positions in a chunk that queries attend within; 0: off.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        rotary_interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        scheduler_metadata: result of `get_scheduler_metadata`; it does not affect results.
        num_splits: 0 to 256, a hint for GPUs; it does not affect results.
        pack_gqa: a hint for GPUs; it does not affect results.
        sm_margin: a hint for GPUs; it does not affect results.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out; with return_softmax_lse (out, softmax_lse, out_accum, softmax_lse_accum), of which the last two are empty.

    Raises:
        RuntimeError: the cache is full. Nothing was written.
        AssertionError: the last dimension of a cache is not contiguous.

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_with_kvcache
    >>> k_cache, v_cache, x = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8), torch.ones(1, 1, 2, 8)
    >>> flash_attn_with_kvcache(x, k_cache, v_cache, x, x, cache_seqlens=3, causal=True).shape, k_cache[0, 3, 0, 0]
    (torch.Size([1, 1, 2, 8]), tensor(1.))
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        assert dense(name, cache).stride(-1) == 1, f"{name} must have contiguous last dimension"
    check_num_splits(num_splits, 256)
    if scheduler_metadata is not None and scheduler_metadata.dtype is not torch.int32:
        raise TypeError(f"scheduler_metadata must be get_scheduler_metadata's, got {scheduler_metadata.dtype}.")
    packed = cu_seqlens_q is not None
    rows = dense("q", q).shape[0 if packed else 1] if max_seqlen_q is None else integer("max_seqlen_q", max_seqlen_q)
    slots = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    bounds = window_bounds(window_size, causal, (slots - 1, rows - 1))
    options: dict[str, Any] = {
        "scale": softmax_scale, "softcap": max(real("softcap", softcap), 0.0), "leftpad_k": cache_leftpad,
        "chunk": integer("attention_chunk", attention_chunk), "block_table": page_table,
        "cache_batch_idx": cache_batch_idx,
    }  # fmt: skip
    rotary = None if rotary_cos is None and rotary_sin is None else Rotary(rotary_cos, rotary_sin, rotary_interleaved)
    descales = (q_descale, k_descale, v_descale)
    beyond = (cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens, qv, *descales)
    with torch.no_grad():
        if all(x is None for x in beyond) and q.dtype is not FP8 and not (rotary and attention_chunk):
            options.update({"window": bounds, "cache_seqlens": cache_seqlens, "k": k, "v": v, "return_lse": True})
            options.update(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved)
            out, lse = attention_with_kvcache(q, k_cache, v_cache, **options)
        else:
            options.update({"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": rows if packed else None})
            new = NewKeys(k, v, cu_seqlens_k_new, cache_seqlens, rotary, rotary_seqlens)
            q, options["seqused_k"] = new.append(q, k_cache, v_cache, bounds, options)
            out, lse = attend_extended(q, k_cache, v_cache, qv=qv, descales=descales, bounds=bounds, **options)
    return (out, lse, lse.new_empty(0), lse.new_empty(0)) if return_softmax_lse else out
