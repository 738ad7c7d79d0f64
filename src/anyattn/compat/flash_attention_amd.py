"""flash_attention_amd package: its function and its module, on every machine, with gradients.

Arguments mean the same as in flash_attn: causal is aligned to the bottom right, and windows are (left, right).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import flash_attn


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Compute attention, like `anyattn.compat.flash_attn.flash_attn_func`.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_kv, head_dim).
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.

    Returns:
        (batch, seqlen_q, nheads, head_dim).

    >>> import torch
    >>> x = torch.ones(1, 16, 2, 8)
    >>> flash_attn_func(x, x, x, causal=True).shape
    torch.Size([1, 16, 2, 8])
    """
    out: Tensor = flash_attn.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size)
    return out


class FlashAttention(torch.nn.Module):
    """Module that computes `flash_attn_func`.

    Args:
        softmax_scale: default head_dim ** -0.5.
        attention_dropout: dropout probability, in training only.
    """

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.attention_dropout = attention_dropout

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor:
        """Compute attention; returns (batch, seqlen_q, nheads, head_dim).

        Args:
            q: (batch, seqlen_q, nheads, head_dim).
            k: (batch, seqlen_k, nheads_kv, head_dim).
            v: (batch, seqlen_k, nheads_kv, head_dim).
            causal: aligned to the bottom right.
            window_size: (left, right), inclusive; -1: unbounded.
        """
        dropout_p = self.attention_dropout if self.training else 0.0
        return flash_attn_func(q, k, v, dropout_p, self.softmax_scale, causal, window_size)
