"""flash_attn_triton package: flash_attn 2's functions in its order of arguments, and its module.

anyattn also computes what the package does not: dropout, windows, ALiBi, softcap, any length, packed sequences and a KV
cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import api
from . import flash_attn
from .flash_attn import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache

__version__ = "0.1.1"  # version of these signatures

__all__ = [
    "FlashAttention",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> Any:
    """Compute attention, like `anyattn.compat.flash_attn.flash_attn_func`, in the package's order of arguments.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_kv, head_dim).
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v), or (out, softmax_lse, S_dmask) with return_attn_probs.

    >>> import torch
    >>> x = torch.ones(1, 16, 2, 8)
    >>> flash_attn_func(x, x, x, causal=True).shape
    torch.Size([1, 16, 2, 8])
    """
    return flash_attn.flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> Any:
    """Compute `flash_attn_func` for packed queries, keys and values.

    Args:
        qkv: (batch, seqlen, 3, nheads, head_dim), queries, keys and values.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen, nheads, head_dim), or (out, softmax_lse, S_dmask) with return_attn_probs.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn.flash_attn_qkvpacked_func(qkv, *options)


class FlashAttention(torch.nn.Module):
    """Module that computes attention of (batch, seqlen, nheads, head_dim) tensors.

    Args:
        attention_dropout: dropout probability, in training only.
        softmax_scale: default head_dim ** -0.5.
    """

    def __init__(self, attention_dropout: float = 0.0, softmax_scale: float | None = None) -> None:
        super().__init__()
        self.dropout_p = attention_dropout
        self.softmax_scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, attn_bias: Tensor | None = None) -> Tensor:
        """Compute attention; returns (batch, seqlen_q, nheads, head_dim).

        Args:
            q: (batch, seqlen_q, nheads, head_dim).
            k: (batch, seqlen_k, nheads, head_dim).
            v: (batch, seqlen_k, nheads, head_dim).
            causal: aligned to the bottom right.
            attn_bias: added to the scaled scores, (batch, nheads, seqlen_q, seqlen_k). It has a gradient.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        out: Tensor = api.attention(
            q, k, v, causal=causal, scale=self.softmax_scale, bias=attn_bias, dropout_p=dropout_p
        )
        return out
