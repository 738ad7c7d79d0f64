"""flash_attn 2's functions, with its signatures and results, on every backend of anyattn.

The same rules hold for all of them:

* nheads is a multiple of nheads_kv; query head h reads KV head h // (nheads / nheads_kv).
* softmax_scale: any finite number, default head_dim ** -0.5. softcap > 0: s becomes softcap * tanh(s / softcap).
* causal and window_size (left, right; inclusive, -1: unbounded; a tuple, list or tensor) are aligned to the bottom
  right: row i is at position i + seqlen_k - seqlen_q.
* alibi_slopes (nheads,) or (batch, nheads): minus slope * |i + seqlen_k - seqlen_q - j|; they have no gradient.
* dropout_p: drawn from torch's default generator, so torch.manual_seed repeats the bits. RuntimeError with softcap.
* deterministic: run-to-run identity, which the CPU always gives.
* return_attn_probs: (out, softmax_lse, S_dmask) instead of out. softmax_lse is float32, the natural logarithm, +inf for
  a row that sees no key (whose out is 0). S_dmask with dropout: (batch, nheads, seqlen_q, seqlen_k), lengths rounded up
  to 128, exp(score - row maximum), negative where dropped; a slow, exact computation for tests. Without dropout it is
  an empty tensor. Neither has a gradient.

What upstream refuses and this computes: float32 and float64, any head_dim, head_dim_v other than head_dim, tensors on a
CPU, pages of any size. Strides are free; a copy is made where the last dimension is not contiguous.
Bad arguments raise ValueError or TypeError naming the argument; nothing was written then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...api import attention_with_kvcache
from ...frameworks.torch_tools import dense, round_multiple
from ...scalars import real
from .._flash_attn_common.calls import attend, only_speed, window_bounds
from ._private import (
    Scores,
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    forward,
    varlen_tables,
)

USE_TRITON_ROCM = False


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, nheads, head_dim) to k, v (batch, seqlen_k, nheads_kv, ...).

    The arguments are those of the module's docstring. Returns out (batch, seqlen_q, nheads, head_dim_v), or
    (out, softmax_lse (batch, nheads, seqlen_q), S_dmask).

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_func
    >>> q, k = torch.ones(1, 4, 4, 8), torch.ones(1, 6, 2, 8)
    >>> flash_attn_func(q, k, k, causal=True).shape
    torch.Size([1, 4, 4, 8])
    """
    scores = Scores(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if not return_attn_probs:
        return attend(q, k, v, **scores.arguments())[0]
    return forward(q, k, v, scores, True)[:3]


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of k, v = kv (batch, seqlen_k, 2, nheads_kv, head_dim), as views.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_kvpacked_func
    >>> flash_attn_kvpacked_func(torch.ones(1, 4, 4, 8), torch.ones(1, 6, 2, 2, 8)).shape
    torch.Size([1, 4, 4, 8])
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = _unpack("kv", kv, 5)
    return flash_attn_func(q, k, v, *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q, k, v = qkv (batch, seqlen, 3, nheads, head_dim), as views.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.ones(1, 4, 3, 2, 8), causal=True).shape
    torch.Size([1, 4, 2, 8])
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = _unpack("qkv", qkv, 5)
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention over sequences packed one behind the other: q (total_q, nheads, head_dim), k and v (total_k, ...).

    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where each sequence begins. max_seqlen_q, max_seqlen_k: ints or
    tensors, at least the longest length (ValueError otherwise). block_table: (batch, max_pages); k and v are then
    (num_pages, page_size, nheads_kv, ...) and cu_seqlens_k gives the lengths.
    Returns out (total_q, nheads, head_dim_v), or (out, softmax_lse (nheads, total_q), S_dmask of the longest lengths).

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_varlen_func
    >>> x, cu_seqlens = torch.ones(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
    torch.Size([7, 2, 8])
    """
    tables = varlen_tables(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    scores = Scores(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if not return_attn_probs:
        return attend(q, k, v, **scores.arguments(), **tables)[0]
    return forward(q, k, v, scores, True, **tables)[:3]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of k, v = kv (total_k, 2, nheads_kv, head_dim), as views.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_varlen_kvpacked_func
    >>> q, kv, cu_seqlens = torch.ones(7, 4, 8), torch.ones(7, 2, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 4, 4).shape
    torch.Size([7, 4, 8])
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = _unpack("kv", kv, 4)
    return flash_attn_varlen_func(q, k, v, *(*lengths, *options))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q, k, v = qkv (total, 3, nheads, head_dim), as views.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> qkv, cu_seqlens = torch.ones(7, 3, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 4, causal=True).shape
    torch.Size([7, 2, 8])
    """
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = _unpack("qkv", qkv, 4)
    return flash_attn_varlen_func(q, k, v, *(*lengths, *options))


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
    """Attention of q (batch, seqlen_q, nheads, head_dim) to a KV cache, after k and v are appended to it in place.

    Args:
        k_cache: (entries, slots, nheads_kv, head_dim), or with block_table (num_pages, page_size, nheads_kv, head_dim),
            pages of any size. May be a view, contiguous in its last dimension. v_cache: likewise.
        k, v: (batch, seqlen_new, nheads_kv, ...), written at slots cache_seqlens + t: v bit-equal, k after rotary.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), any rotary_dim. k is rotated at cache_seqlens + t; q at
            cache_seqlens + i if causal or windowed, else at cache_seqlens.
        cache_seqlens: keys in the cache before the call, an int or int32 (batch,); None: all slots.
        cache_batch_idx: (batch,), entry of the cache of each sequence; not with block_table.
        cache_leftpad: (batch,), first slot in use.
        block_table: int32 (batch, max_pages).
        num_splits: 0 to 128, without effect on results.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v), or with return_softmax_lse (out, softmax_lse (batch, nheads,
        seqlen_q)). No gradients.

    Raises:
        RuntimeError: the keys do not fit in the cache (naming block_table where there is one). Nothing was written.
        AssertionError: the last dimension of a cache is not contiguous.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache, x = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8), torch.ones(1, 1, 2, 8)
    >>> flash_attn_with_kvcache(x, k_cache, v_cache, x, x, cache_seqlens=3, causal=True).shape, k_cache[0, 3, 0, 0]
    (torch.Size([1, 1, 2, 8]), tensor(1.))
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        assert dense(name, cache).stride(-1) == 1, f"{name} must have contiguous last dimension"
    only_speed(num_splits, 128)
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


def _unpack(name: str, packed: Tensor, ndim: int) -> tuple[Tensor, ...]:
    """Views of q, k, v or k, v, which are packed along the third dimension from the end."""
    packed = dense(name, packed)
    if packed.ndim != ndim or packed.shape[-3] != len(name):
        batch = "batch, seqlen" if ndim == 5 else "total"
        raise ValueError(f"{name} must be ({batch}, {len(name)}, nheads, head_dim), got {tuple(packed.shape)}")
    return packed.unbind(-3)


flash_attn_unpadded_func = flash_attn_varlen_func  # names of 1.x
flash_attn_unpadded_kvpacked_func = flash_attn_varlen_kvpacked_func
flash_attn_unpadded_qkvpacked_func = flash_attn_varlen_qkvpacked_func


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied only if its last dimension is not contiguous."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys per block of the row maxima in S_dmask: here one maximum serves the whole row, of any length."""
    return 2**30


def _applying(function: Callable[..., Any]) -> Callable[..., Any]:
    count = len(inspect.signature(function).parameters)

    def apply(*arguments: Any) -> Any:
        enabled = arguments[count] if len(arguments) > count else True
        with torch.set_grad_enabled(enabled and torch.is_grad_enabled()):
            return function(*arguments[:count], *arguments[count + 1 :])

    return apply


class FlashAttnFunc:
    """`apply` takes `flash_attn_func`'s arguments by position, and is_grad_enabled. No autograd.Function of its own."""

    apply = staticmethod(_applying(flash_attn_func))


class FlashAttnKVPackedFunc:
    """The same of `flash_attn_kvpacked_func`."""

    apply = staticmethod(_applying(flash_attn_kvpacked_func))


class FlashAttnQKVPackedFunc:
    """The same of `flash_attn_qkvpacked_func`."""

    apply = staticmethod(_applying(flash_attn_qkvpacked_func))


class FlashAttnVarlenFunc:
    """The same of `flash_attn_varlen_func`."""

    apply = staticmethod(_applying(flash_attn_varlen_func))


class FlashAttnVarlenKVPackedFunc:
    """The same of `flash_attn_varlen_kvpacked_func`."""

    apply = staticmethod(_applying(flash_attn_varlen_kvpacked_func))


class FlashAttnVarlenQKVPackedFunc:
    """The same of `flash_attn_varlen_qkvpacked_func`."""

    apply = staticmethod(_applying(flash_attn_varlen_qkvpacked_func))


__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]
