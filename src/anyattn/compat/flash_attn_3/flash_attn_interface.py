"""flash_attn 3's functions, with its signatures and results, on every backend of anyattn.

As in flash_attn 2 (see `anyattn.compat.flash_attn.flash_attn_interface`), with these differences:

* softmax_lse is -inf for a row that sees no key; no ALiBi, no dropout.
* qv (..., nheads, head_dim_v): scores are scale * (q k^T + qv v^T), absorbed MLA; softmax_scale is then by default
  (head_dim + head_dim_v) ** -0.5. It has a gradient. k is copied for it.
* q_descale, k_descale, v_descale (batch, nheads_kv): q, k and v stand for x * descale. With float8_e4m3fn inputs the
  computation is in float32 and out is bfloat16, without gradients. Upstream ignores them for other dtypes; here they
  hold for all.
* attention_chunk c > 0: a row sees keys of its own chunk of c positions only. It has gradients, unlike upstream's.
* num_splits, pack_gqa, sm_margin and scheduler_metadata only steer a GPU's speed: accepted, without effect on results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...api import attention_with_kvcache
from ...frameworks.torch_tools import dense
from ...scalars import integer, real
from .._flash_attn_common.calls import only_speed, window_bounds
from .._flash_attn_common.combine import combine
from .._flash_attn_common.inputs import FP8, attend_extended
from ._kvcache import NewKeys, Rotary


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
    """Attention of q (batch, seqlen_q, nheads, head_dim) to k, v (batch, seqlen_k, nheads_kv, ...).

    The arguments are those of the module's docstring. Returns out, or with return_attn_probs (out, softmax_lse (batch,
    nheads, seqlen_q)).

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_func
    >>> q, k = torch.ones(1, 4, 4, 8), torch.ones(1, 6, 2, 8)
    >>> flash_attn_func(q, k, k, causal=True).shape
    torch.Size([1, 4, 4, 8])
    """
    only_speed(num_splits, 256)
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
    """Attention over packed sequences: q (total_q, nheads, head_dim), k and v (total_k, nheads_kv, ...).

    seqused_q, seqused_k: int32 (batch,), rows and keys in use of what cu_seqlens gives each sequence; other rows are 0.
    Returns out, or with return_attn_probs (out, softmax_lse (nheads, total_q)).

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_varlen_func
    >>> x, cu_seqlens = torch.ones(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
    torch.Size([7, 2, 8])
    """
    only_speed(num_splits, 256)
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
    """`flash_attn_func` of qkv (batch, seqlen, 3, nheads, head_dim), as views.

    With num_heads_q, qkv is (batch, seqlen, num_heads_q + 2 nheads_kv, head_dim).

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
            f"with num_heads_q, got {tuple(qkv.shape)}, num_heads_q {num_heads_q}"
        )
    options = (softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap)
    return flash_attn_func(
        q, k, v, *options, deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs
    )


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
    """Attention to a KV cache after appending k and v to it in place; arguments as flash_attn 2's, and besides:

    Args:
        page_table: int32 (batch, max_pages), flash_attn 2's block_table.
        cu_seqlens_q: int32 (batch + 1,); q is then (total_q, nheads, head_dim), and max_seqlen_q its longest length.
        cu_seqlens_k_new: int32 (batch + 1,); k and v are then (total_new, nheads_kv, ...).
        rotary_seqlens: (batch,), positions from which q and k are rotated, instead of cache_seqlens.
        scheduler_metadata: what `get_scheduler_metadata` gave.

    Returns:
        out, or with return_softmax_lse (out, softmax_lse, out_accum, softmax_lse_accum), whose last two are empty. No
        gradients.

    Raises:
        RuntimeError: the keys do not fit in the cache. AssertionError: a cache's last dimension is not contiguous.

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import flash_attn_with_kvcache
    >>> k_cache, v_cache, x = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8), torch.ones(1, 1, 2, 8)
    >>> flash_attn_with_kvcache(x, k_cache, v_cache, x, x, cache_seqlens=3, causal=True).shape, k_cache[0, 3, 0, 0]
    (torch.Size([1, 1, 2, 8]), tensor(1.))
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        assert dense(name, cache).stride(-1) == 1, f"{name} must have contiguous last dimension"
    only_speed(num_splits, 256)
    if scheduler_metadata is not None and scheduler_metadata.dtype is not torch.int32:
        raise TypeError(f"scheduler_metadata must be get_scheduler_metadata's, got {scheduler_metadata.dtype}")
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


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys from those over parts: lse = log sum exp(lse_s), out = sum exp(lse_s - lse) out_s.

    out_partial: (num_splits, batch, seqlen, nheads, head_dim) or (num_splits, total, nheads, head_dim); lse_partial:
    the same less head_dim (heads last). out: a buffer to write; out_dtype: default out_partial's. lse is float32,
    (batch, seqlen, nheads) or (total, nheads), -inf where every part is. No gradients.

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
    """A tensor for `flash_attn_with_kvcache(scheduler_metadata=...)`. Nothing is scheduled ahead here: it is all 0.

    >>> import torch
    >>> from anyattn.compat.flash_attn_3 import get_scheduler_metadata
    >>> get_scheduler_metadata(2, 1, 64, 4, 2, 64, torch.tensor([3, 9], dtype=torch.int32))
    tensor([0, 0, 0], dtype=torch.int32)
    """
    return torch.zeros(batch_size + 1, dtype=torch.int32, device=cache_seqlens.device)
