"""`flash_attn.modules.mha`: multi-head attention with upstream's parameters, so that its checkpoints load."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .... import api
from ...calls import window
from ..layers.rotary import RotaryEmbedding
from ..utils.generation import InferenceParams
from ._inner import CrossAttention as CrossAttention
from ._inner import FlashCrossAttention as FlashCrossAttention
from ._inner import FlashSelfAttention as FlashSelfAttention
from ._inner import SelfAttention as SelfAttention


def get_alibi_slopes(nheads: int) -> list[float]:
    """ALiBi's slopes (Press et al., 2022): 2 ** (-8 (h + 1) / nheads) for a power of two, else filled up from the next.

    >>> get_alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    whole = 2 ** int(math.log2(nheads))
    slopes = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    return slopes if whole == nheads else slopes + get_alibi_slopes(2 * whole)[0::2][: nheads - whole]


class LinearResidual(nn.Linear):
    """nn.Linear that returns its input as well."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input), input


class MHA(nn.Module):
    """Multi-head self- or cross-attention with projections.

    The parameters are named and shaped as upstream's: Wqkv (cross-attention: Wq and Wkv), out_proj, dwconv_*.

    Args:
        embed_dim: of input and output. num_heads divides it.
        num_heads_kv: fewer key and value heads (GQA, MQA); default num_heads.
        cross_attn: queries from x, keys and values from x_kv.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        dropout: of the attention probabilities, in training only.
        softmax_scale: default head_dim ** -0.5.
        causal: rows see no key after their position.
        layer_idx: this layer's key in InferenceParams; needed for generation.
        dwconv: a causal depthwise convolution of size 3 behind the projections.
        rotary_emb_dim: values of each head that are rotated; 0: none. rotary_emb_base, rotary_emb_scale_base,
            rotary_emb_interleaved: see RotaryEmbedding.
        use_alibi, window_size: with use_flash_attn only, as upstream.
        fused_bias_fc: without effect on results: the projections are nn.Linear.
        use_flash_attn: allows windows, ALiBi and packed sequences; without it key_padding_mask. The memory is O(N)
            either way.
        return_residual: returns (out, x).
        checkpointing: recomputes the attention in the backward.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.cross_attn, self.causal, self.layer_idx = cross_attn, causal, layer_idx
        self.dwconv, self.rotary_emb_dim, self.use_flash_attn = dwconv, rotary_emb_dim, use_flash_attn
        self.return_residual, self.checkpointing = return_residual, checkpointing
        self._check(use_alibi, tuple(window_size))
        self.head_dim = embed_dim // num_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device
            )
        self._project(qkv_proj_bias, out_proj_bias, factory)
        options: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        if use_flash_attn:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
            options |= {"alibi_slopes": slopes, "window_size": window_size}
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**options)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**options)

    def _check(self, use_alibi: bool, window_size: tuple[int, ...]) -> None:
        if self.embed_dim % self.num_heads or self.num_heads % self.num_heads_kv:
            raise ValueError(
                "num_heads must divide embed_dim, and num_heads_kv num_heads; got "
                f"embed_dim {self.embed_dim}, num_heads {self.num_heads}, num_heads_kv {self.num_heads_kv}"
            )
        if (use_alibi or window_size != (-1, -1)) and not self.use_flash_attn:
            raise ValueError("use_alibi and window_size need use_flash_attn=True")
        if self.rotary_emb_dim > 0 and self.cross_attn:
            raise ValueError("rotary_emb_dim and cross_attn exclude each other")

    def _project(self, qkv_bias: bool, out_bias: bool, factory: dict[str, Any]) -> None:
        width, kv_dim = self.embed_dim, 2 * self.num_heads_kv * self.head_dim
        packed = LinearResidual if self.return_residual else nn.Linear
        if self.cross_attn:
            self.Wq = nn.Linear(width, width, bias=qkv_bias, **factory)
            self.Wkv = packed(width, kv_dim, bias=qkv_bias, **factory)
        else:
            self.Wqkv = packed(width, width + kv_dim, bias=qkv_bias, **factory)
        if self.dwconv and self.num_heads == self.num_heads_kv and not self.cross_attn:
            self.dwconv_qkv = _convolution(width + kv_dim, factory)
        elif self.dwconv:
            self.dwconv_q, self.dwconv_kv = _convolution(width, factory), _convolution(kv_dim, factory)
        self.out_proj = nn.Linear(width, width, bias=out_bias, **factory)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """A KV cache for InferenceParams.key_value_memory_dict[layer_idx]."""
        weight = self.out_proj.weight
        return weight.new_empty(batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, seqlen, embed_dim), or with cu_seqlens (total, embed_dim); with return_residual also the input.

        Args:
            x: of the same shape.
            x_kv: (batch, seqlen_k, embed_dim), for cross-attention; default x.
            key_padding_mask: (batch, seqlen), bool, True: keep; without use_flash_attn only.
            cu_seqlens, max_seqlen: of packed sequences; with use_flash_attn, and neither dwconv nor rotary.
            mixer_subset: for cross-attention: which rows of x ask.
            inference_params: for generation; the new keys and values are written behind those in the cache.
            kwargs: for the inner attention: causal, and for cross-attention cu_seqlens_k and max_seqlen_k.
        """
        self._check_call(x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params, kwargs)
        if self.use_flash_attn:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        else:
            kwargs |= {"key_padding_mask": key_padding_mask}
        q, kv, x = self._queries_keys_values(x, x_kv, mixer_subset, inference_params)
        if inference_params is not None:
            context = self._generate(q, kv, inference_params)
        elif kv is None:  # q is qkv
            context = self._attend(self.inner_attn, q, **kwargs)
        else:
            context = self._attend(self.inner_cross_attn, q, kv, **kwargs)
        out: Tensor = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out
