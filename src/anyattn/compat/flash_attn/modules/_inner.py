"""Attention of `MHA` without projections: four modules, all with O(N) memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .... import api
from ..flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

Window = tuple[int, int]


class Inner(nn.Module):
    """Base class of the four attention modules."""

    def __init__(self, causal: bool, softmax_scale: float | None, attention_dropout: float) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def dropout_p(self) -> float:
        return self.drop.p if self.training else 0.0


class Flash(Inner):
    """Base class of the modules with the options of flash_attn's functions."""

    alibi_slopes: Tensor | None

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.dropout_p(),
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }

    def _keep(self, alibi_slopes: Tensor | None, window_size: Window, deterministic: bool) -> None:
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic


class FlashSelfAttention(Flash):
    """Attention of packed q, k and v, like `flash_attn_qkvpacked_func`. Dropout is active in training only."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)
        self._keep(alibi_slopes, window_size, deterministic)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Compute attention; returns (batch, seqlen, nheads, head_dim), or with cu_seqlens (total, nheads, head_dim).

        Args:
            qkv: (batch, seqlen, 3, nheads, head_dim), or (total, 3, nheads, head_dim) with cu_seqlens.
            causal: overrides the module's option.
            cu_seqlens: int32 (batch + 1,), cumulative lengths of packed sequences.
            max_seqlen: longest length, needed with cu_seqlens.
        """
        options = self._options(causal)
        out: Tensor
        if cu_seqlens is None:
            out = flash_attn_qkvpacked_func(qkv, **options)
        elif max_seqlen is None:
            raise ValueError("max_seqlen must be passed with cu_seqlens, got None.")
        else:
            out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)
        return out


class FlashCrossAttention(Flash):
    """Attention of q to packed k and v, like `flash_attn_kvpacked_func`."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Window = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)
        self._keep(alibi_slopes, window_size, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Compute attention; returns (batch, seqlen_q, nheads, head_dim), or (total_q, nheads, head_dim).

        Args:
            q: (batch, seqlen_q, nheads, head_dim), or (total_q, nheads, head_dim) with cu_seqlens.
            kv: (batch, seqlen_k, 2, nheads_kv, head_dim), or (total_k, 2, nheads_kv, head_dim).
            causal: overrides the module's option.
            cu_seqlens: int32 (batch + 1,), cumulative lengths of q.
            max_seqlen: longest length of q.
            cu_seqlens_k: int32 (batch + 1,), cumulative lengths of k and v.
            max_seqlen_k: longest length of k and v.
        """
        options = self._options(causal)
        out: Tensor
        if cu_seqlens is None:
            out = flash_attn_kvpacked_func(q, kv, **options)
        elif max_seqlen is None or cu_seqlens_k is None or max_seqlen_k is None:
            raise ValueError("max_seqlen, cu_seqlens_k and max_seqlen_k must be passed with cu_seqlens.")
        else:
            out = flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options)
        return out


class SelfAttention(Inner):
    """Attention like `FlashSelfAttention`, with a padding mask instead of windows, ALiBi and packed sequences.

    A query without visible keys gives 0. (Upstream's additive mask of -10000 gives the mean of v.)
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Compute attention; returns (batch, seqlen, nheads, head_dim).

        Args:
            qkv: (batch, seqlen, 3, nheads, head_dim).
            causal: overrides the module's option.
            key_padding_mask: boolean (batch, seqlen); True: keep.
        """
        return _masked(self, qkv.unbind(2), causal, key_padding_mask, None)


class CrossAttention(Inner):
    """Attention like `FlashCrossAttention`, with a padding mask.

    Causal: the last query is at the last key that is kept.
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Compute attention; returns (batch, seqlen_q, nheads, head_dim).

        Args:
            q: (batch, seqlen_q, nheads, head_dim).
            kv: (batch, seqlen_k, 2, nheads_kv, head_dim).
            causal: overrides the module's option.
            key_padding_mask: boolean (batch, seqlen_k); True: keep.
        """
        offset = None if key_padding_mask is None else key_padding_mask.sum(-1) - q.shape[1]
        return _masked(self, (q, *kv.unbind(2)), causal, key_padding_mask, offset)


def _masked(
    module: Inner,
    qkv: tuple[Tensor, ...],
    causal: bool | None,
    key_padding_mask: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    out: Tensor = api.attention(
        *qkv,
        causal=module.causal if causal is None else causal,
        scale=module.softmax_scale,
        dropout_p=module.dropout_p(),
        mask=None if key_padding_mask is None else key_padding_mask.bool()[:, None, None],
        offset=offset,
    )
    return out
