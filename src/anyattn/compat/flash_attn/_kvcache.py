"""Function of flash_attn 2 for a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...decoding import attention_with_kvcache
from ...frameworks.torch_tools import dense
from ...scalars import real
from .._flash_attn_common.calls import check_num_splits, window_bounds


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append k and v to a KV cache in place, then attend to the cache. There are no gradients.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k_cache: (entries, slots, nheads_kv, head_dim); with block_table, pages (num_pages, page_size, nheads_kv,
            head_dim) of any size. It may be a view, contiguous in its last dimension.
        v_cache: like k_cache, with head_dim_v.
        k: (batch, seqlen_new, nheads_kv, head_dim), new keys; key t is rotated and written to slot cache_seqlens + t.
        v: (batch, seqlen_new, nheads_kv, head_dim_v), new values, written unchanged.
        rotary_cos: (positions, rotary_dim / 2). New key t is rotated at cache_seqlens + t; query i at cache_seqlens + i
            if causal or windowed, else at cache_seqlens.
        rotary_sin: (positions, rotary_dim / 2).
        cache_seqlens: number of keys in the cache before the call, an int or int32 (batch,); None: all slots.
        cache_batch_idx: (batch,), cache entry of each sequence; not combined with block_table.
        cache_leftpad: (batch,), first slot in use.
        block_table: int32 (batch, max_pages), pages of each sequence, of any size.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        rotary_interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        num_splits: 0 to 128, a hint for GPUs; it does not affect results.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v); with return_softmax_lse (out, softmax_lse (batch, nheads, seqlen_q)).

    Raises:
        RuntimeError: the cache is full. Nothing was written.
        AssertionError: the last dimension of a cache is not contiguous.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache, x = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8), torch.ones(1, 1, 2, 8)
    >>> flash_attn_with_kvcache(x, k_cache, v_cache, x, x, cache_seqlens=3, causal=True).shape, k_cache[0, 3, 0, 0]
    (torch.Size([1, 1, 2, 8]), tensor(1.))
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        assert dense(name, cache).stride(-1) == 1, f"{name} must have contiguous last dimension"
    check_num_splits(num_splits, 128)
    slots = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    # a window as wide as the cache is none, and q is then rotated at one position
    window = window_bounds(window_size, causal, (slots, max(slots, dense("q", q).shape[1])))
    with torch.no_grad():
        out, lse = attention_with_kvcache(
            q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx,
            block_table=block_table, leftpad_k=cache_leftpad, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved, window=window, scale=softmax_scale,
            softcap=max(real("softcap", softcap), 0.0), alibi_slopes=alibi_slopes, return_lse=True,
        )  # fmt: skip
    return (out, lse.masked_fill(lse == -torch.inf, torch.inf)) if return_softmax_lse else out
