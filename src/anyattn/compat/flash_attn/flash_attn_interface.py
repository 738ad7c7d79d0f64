"""Functions of flash_attn 2, with its signatures and results, on every backend of anyattn.

These rules hold for all functions:

* nheads is a multiple of nheads_kv. Query head h uses KV head h // (nheads / nheads_kv).
* causal and window_size (a tuple, list or tensor) are aligned to the bottom right: query i has position
  i + seqlen_k - seqlen_q.
* alibi_slopes add -slope * |i + seqlen_k - seqlen_q - j| to the scores.
* dropout uses torch's default generator, so torch.manual_seed makes it reproducible.
* softmax_lse is float32, the natural logarithm, +inf for a query without visible keys, whose out is 0.
* S_dmask with dropout is (batch, nheads, seqlen_q, seqlen_k), lengths rounded up to 128: exp(score - row maximum),
  negative if dropped. It is a slow, exact computation for tests. Without dropout it is an empty tensor. softmax_lse and
  S_dmask have no gradients.

In addition to upstream, these functions support float32 and float64, any head_dim, a head_dim_v unlike head_dim, CPU
tensors and pages of any size. Any strides are accepted; a copy is made if the last dimension is not contiguous.
Wrong arguments raise a ValueError or TypeError that names the argument, before anything is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...frameworks.torch_tools import round_multiple
from .._flash_attn_common.calls import attend, unpack
from ._kvcache import flash_attn_with_kvcache
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
)
from ._varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

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
    """Compute attention of q to k and v.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_kv, head_dim).
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v). With return_attn_probs: (out, softmax_lse, S_dmask), softmax_lse
        float32 (batch, nheads, seqlen_q). The module describes S_dmask.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: dropout_p is combined with softcap.

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
    """Compute `flash_attn_func` for packed keys and values, used as views.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        kv: (batch, seqlen_k, 2, nheads_kv, head_dim), keys and values.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, nheads, head_dim). With return_attn_probs: (out, softmax_lse, S_dmask), softmax_lse
        float32 (batch, nheads, seqlen_q). The module describes S_dmask.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: dropout_p is combined with softcap.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_kvpacked_func
    >>> flash_attn_kvpacked_func(torch.ones(1, 4, 4, 8), torch.ones(1, 6, 2, 2, 8)).shape
    torch.Size([1, 4, 4, 8])
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = unpack("kv", kv, 5)
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
    """Compute `flash_attn_func` for packed queries, keys and values, used as views.

    Args:
        qkv: (batch, seqlen, 3, nheads, head_dim), queries, keys and values.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen, nheads, head_dim). With return_attn_probs: (out, softmax_lse, S_dmask), softmax_lse float32
        (batch, nheads, seqlen). The module describes S_dmask.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: dropout_p is combined with softcap.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.ones(1, 4, 3, 2, 8), causal=True).shape
    torch.Size([1, 4, 2, 8])
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = unpack("qkv", qkv, 5)
    return flash_attn_func(q, k, v, *options)


flash_attn_unpadded_func = flash_attn_varlen_func  # names of 1.x
flash_attn_unpadded_kvpacked_func = flash_attn_varlen_kvpacked_func
flash_attn_unpadded_qkvpacked_func = flash_attn_varlen_qkvpacked_func


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """Return x, copied only if its last dimension is not contiguous.

    Args:
        x: a tensor or None.
    """
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Return the keys per row maximum in S_dmask: more than any row has, because each row has one maximum."""
    return 2**30


def _applying(function: Callable[..., Any]) -> Callable[..., Any]:
    count = len(inspect.signature(function).parameters)

    def apply(*arguments: Any) -> Any:
        enabled = arguments[count] if len(arguments) > count else True
        with torch.set_grad_enabled(enabled and torch.is_grad_enabled()):
            return function(*arguments[:count], *arguments[count + 1 :])

    return apply


class FlashAttnFunc:
    """Class whose `apply` has the arguments of `flash_attn_func` by position, then is_grad_enabled."""

    apply = staticmethod(_applying(flash_attn_func))


class FlashAttnKVPackedFunc:
    """Class whose `apply` has the arguments of `flash_attn_kvpacked_func` by position, then is_grad_enabled."""

    apply = staticmethod(_applying(flash_attn_kvpacked_func))


class FlashAttnQKVPackedFunc:
    """Class whose `apply` has the arguments of `flash_attn_qkvpacked_func` by position, then is_grad_enabled."""

    apply = staticmethod(_applying(flash_attn_qkvpacked_func))


class FlashAttnVarlenFunc:
    """Class whose `apply` has the arguments of `flash_attn_varlen_func` by position, then is_grad_enabled."""

    apply = staticmethod(_applying(flash_attn_varlen_func))


class FlashAttnVarlenKVPackedFunc:
    """Class whose `apply` has the arguments of `flash_attn_varlen_kvpacked_func` by position, then is_grad_enabled."""

    apply = staticmethod(_applying(flash_attn_varlen_kvpacked_func))


class FlashAttnVarlenQKVPackedFunc:
    """Class whose `apply` has the arguments of `flash_attn_varlen_qkvpacked_func` by position, then is_grad_enabled."""

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
