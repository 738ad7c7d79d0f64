"""The attention of `MHA`, without projections: four modules, all of them in O(N) memory."""

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
    """What the four attention modules share."""

    def __init__(self, causal: bool, softmax_scale: float | None, attention_dropout: float) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def dropout_p(self) -> float:
        return self.drop.p if self.training else 0.0


class Flash(Inner):
    """With the options that flash_attn's functions have."""

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
    """Attention of packed q, k and v; the arguments are those of `flash_attn_qkvpacked_func`.

    attention_dropout holds in training only.
    """

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
        """(batch, seqlen, nheads, head_dim), or with cu_seqlens (total, nheads, head_dim).

        Args:
            qkv: (batch, seqlen, 3, nheads, head_dim), or (total, 3, nheads, head_dim) with cu_seqlens.
            causal: instead of the module's.
            cu_seqlens: (batch + 1,), int32. max_seqlen: needed with it.
        """
        options = self._options(causal)
        out: Tensor
        if cu_seqlens is None:
            out = flash_attn_qkvpacked_func(qkv, **options)
        elif max_seqlen is None:
            raise ValueError("cu_seqlens needs max_seqlen too")
        else:
            out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)
        return out


class FlashCrossAttention(Flash):
    """Attention of q to packed k and v; the arguments are those of `flash_attn_kvpacked_func`."""

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
        """(batch, seqlen_q, nheads, head_dim), or with cu_seqlens (total_q, nheads, head_dim).

        Args:
            q: (batch, seqlen_q, nheads, head_dim), or (total_q, nheads, head_dim) with cu_seqlens.
            kv: (batch, seqlen_k, 2, nheads_kv, head_dim), or (total_k, 2, nheads_kv, head_dim).
            causal: instead of the module's.
            cu_seqlens, max_seqlen: of q; cu_seqlens_k, max_seqlen_k: of k and v.
        """
        options = self._options(causal)
        out: Tensor
        if cu_seqlens is None:
            out = flash_attn_kvpacked_func(q, kv, **options)
        elif max_seqlen is None or cu_seqlens_k is None or max_seqlen_k is None:
            raise ValueError("cu_seqlens needs max_seqlen, cu_seqlens_k and max_seqlen_k too")
        else:
            out = flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options)
        return out


class SelfAttention(Inner):
    """`FlashSelfAttention` with a padding mask instead of windows, ALiBi and packed sequences.

    Here a row that sees no key gives 0 (upstream's additive mask of -10000 gives it the mean of v).
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """(batch, seqlen, nheads, head_dim) from qkv (batch, seqlen, 3, nheads, head_dim).

        key_padding_mask: (batch, seqlen), bool, True: keep.
        """
        return _masked(self, qkv.unbind(2), causal, key_padding_mask, None)


class CrossAttention(Inner):
    """`FlashCrossAttention` with a padding mask. Causal: the last row is at the last key that the mask keeps."""

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """(batch, seqlen_q, nheads, head_dim) from kv (batch, seqlen_k, 2, nheads_kv, head_dim).

        key_padding_mask: (batch, seqlen_k), bool, True: keep.
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
