"""The flash_attention_amd package: its function and its module, on every machine, with gradients.

Both mean what flash_attn means: causal is aligned to the bottom right, windows are (left, right).
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
    """(batch, seqlen_q, nheads, head_dim), from the arguments of `anyattn.compat.flash_attn.flash_attn_func`.

    >>> import torch
    >>> x = torch.ones(1, 16, 2, 8)
    >>> flash_attn_func(x, x, x, causal=True).shape
    torch.Size([1, 16, 2, 8])
    """
    out: Tensor = flash_attn.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size)
    return out


class FlashAttention(torch.nn.Module):
    """`flash_attn_func` as a module.

    Args:
        softmax_scale: default head_dim ** -0.5.
        attention_dropout: in training only.
    """

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.attention_dropout = attention_dropout

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor:
        """(batch, seqlen_q, nheads, head_dim)."""
        dropout_p = self.attention_dropout if self.training else 0.0
        return flash_attn_func(q, k, v, dropout_p, self.softmax_scale, causal, window_size)
