"""`flash_attn.modules.mha`: multi-head attention with upstream's parameters, so that its checkpoints load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .... import decoding
from ....nn import alibi_slopes as get_alibi_slopes
from ..layers.rotary import RotaryEmbedding
from ..utils.generation import InferenceParams
from ._inner import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "LinearResidual",
    "SelfAttention",
    "get_alibi_slopes",
]


class LinearResidual(nn.Linear):
    """Linear layer that also returns its input."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input), input


class MHA(nn.Module):
    """Multi-head self- or cross-attention with projections.

    Parameters have upstream's names and shapes: Wqkv (cross-attention: Wq and Wkv), out_proj, dwconv_*.

    Args:
        embed_dim: size of input and output, a multiple of num_heads.
        num_heads: number of query heads.
        num_heads_kv: number of key and value heads (GQA, MQA); default num_heads.
        cross_attn: queries from x, keys and values from x_kv.
        qkv_proj_bias: add a bias in the q, k and v projections.
        out_proj_bias: add a bias in the output projection.
        dropout: dropout of the attention probabilities, in training only.
        softmax_scale: default head_dim ** -0.5.
        causal: each query attends only to keys at or before its own position.
        layer_idx: this layer's key in InferenceParams, needed for generation.
        dwconv: a causal depthwise convolution of size 3 after the projections.
        rotary_emb_dim: number of values of each head that are rotated; 0: none.
        rotary_emb_base: see RotaryEmbedding.
        rotary_emb_scale_base: see RotaryEmbedding.
        rotary_emb_interleaved: see RotaryEmbedding.
        use_alibi: add ALiBi to the scores; with use_flash_attn only, as upstream.
        window_size: (left, right); with use_flash_attn only, as upstream.
        fused_bias_fc: no effect on results, because the projections are nn.Linear.
        use_flash_attn: allow windows, ALiBi and packed sequences; otherwise key_padding_mask. Memory is O(N) in both
            cases.
        return_residual: return (out, x).
        checkpointing: recompute the attention in the backward pass.
        device: device of the parameters.
        dtype: dtype of the parameters.
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
            options.update({"alibi_slopes": slopes, "window_size": window_size})
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**options)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**options)

    def _check(self, use_alibi: bool, window_size: tuple[int, ...]) -> None:
        if self.embed_dim % self.num_heads or self.num_heads % self.num_heads_kv:
            raise ValueError(
                "num_heads must divide embed_dim, and num_heads_kv num_heads, got "
                f"embed_dim {self.embed_dim}, num_heads {self.num_heads}, num_heads_kv {self.num_heads_kv}."
            )
        if (use_alibi or window_size != (-1, -1)) and not self.use_flash_attn:
            raise ValueError("use_flash_attn must be True for use_alibi and window_size, got False.")
        if self.rotary_emb_dim > 0 and self.cross_attn:
            raise ValueError("rotary_emb_dim cannot be combined with cross_attn.")

    def _project(self, qkv_bias: bool, out_bias: bool, factory: dict[str, Any]) -> None:
        width, kv_dim = self.embed_dim, 2 * self.num_heads_kv * self.head_dim
        packed = LinearResidual if self.return_residual else nn.Linear
        if self.cross_attn:
            self.Wq = nn.Linear(width, width, bias=qkv_bias, **factory)
            self.Wkv = packed(width, kv_dim, bias=qkv_bias, **factory)
        else:
            self.Wqkv = packed(width, width + kv_dim, bias=qkv_bias, **factory)
        if self.dwconv and self.num_heads == self.num_heads_kv and not self.cross_attn:
            self.dwconv_qkv = Convolution(width + kv_dim, factory)
        elif self.dwconv:
            self.dwconv_q, self.dwconv_kv = Convolution(width, factory), Convolution(kv_dim, factory)
        self.out_proj = nn.Linear(width, width, bias=out_bias, **factory)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a KV cache for InferenceParams.key_value_memory_dict[layer_idx].

        Args:
            batch_size: entries of the cache.
            max_seqlen: slots of each entry.
            dtype: default: the dtype of the parameters.
        """
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
        """Compute attention; returns (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.

        With return_residual, the input is returned too.

        Args:
            x: (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.
            x_kv: (batch, seqlen_k, embed_dim), for cross-attention; default x.
            key_padding_mask: boolean (batch, seqlen), True: keep; without use_flash_attn only.
            cu_seqlens: int32 (batch + 1,), cumulative lengths; with use_flash_attn, and without dwconv and rotary.
            max_seqlen: longest length, needed with cu_seqlens.
            mixer_subset: rows of x that are queries, for cross-attention.
            inference_params: for generation; new keys and values are written after those in the cache.
            **kwargs: for the inner attention: causal, and for cross-attention cu_seqlens_k and max_seqlen_k.
        """
        self._check_call(x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params)
        if inference_params is not None and kwargs:
            raise ValueError(f"inference_params cannot be combined with other options, got {', '.join(kwargs)}.")
        if self.use_flash_attn:
            kwargs.update({"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen})
        else:
            kwargs.update({"key_padding_mask": key_padding_mask})
        if self.cross_attn:
            tensors, x = self._cross(x, x_kv, mixer_subset)
        else:
            tensors, x = self._self(x, inference_params)
        if inference_params is not None:
            context = self._generate(tensors, inference_params)
        else:
            inner = self.inner_attn if len(tensors) == 1 else self.inner_cross_attn
            context = self._attend(inner, *tensors, **kwargs)
        out: Tensor = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check_call(
        self,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        mixer_subset: Any,
        inference_params: InferenceParams | None,
    ) -> None:
        packed = cu_seqlens is not None or max_seqlen is not None
        if packed and (cu_seqlens is None or max_seqlen is None):
            raise ValueError("cu_seqlens and max_seqlen must be passed together, got one of them.")
        if packed and (not self.use_flash_attn or self.dwconv or self.rotary_emb_dim):
            raise ValueError("cu_seqlens needs a module with use_flash_attn=True, without dwconv and rotary_emb_dim.")
        if key_padding_mask is not None and self.use_flash_attn:
            raise ValueError(
                "key_padding_mask needs a module with use_flash_attn=False. Or unpad the batch and pass cu_seqlens."
            )
        if not self.cross_attn and (x_kv is not None or mixer_subset is not None):
            raise ValueError("x_kv and mixer_subset need a module with cross_attn=True.")
        if inference_params is not None and (packed or key_padding_mask is not None or self.dwconv):
            raise ValueError("inference_params cannot be combined with cu_seqlens, key_padding_mask or dwconv.")
        if inference_params is not None and self.layer_idx is None:
            raise ValueError("inference_params needs a module with layer_idx, got None. Pass layer_idx to MHA.")

    def _self(self, x: Tensor, inference_params: InferenceParams | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return ((qkv,), x), or with fewer KV heads ((q, kv), x), rotated."""
        qkv, x = self.Wqkv(x) if self.return_residual else (self.Wqkv(x), x)
        offset: int | Tensor = 0
        longest = None
        if inference_params is not None:
            lengths, longest = inference_params.lengths_per_sample, inference_params.max_seqlen
            offset = inference_params.seqlen_offset if lengths is None else lengths[: len(x)]
        if self.num_heads == self.num_heads_kv:
            qkv = self.dwconv_qkv(qkv) if self.dwconv else qkv
            qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
            return (self.rotary_emb(qkv, None, offset, longest) if self.rotary_emb_dim else qkv,), x
        q, kv = self._split(qkv[..., : self.embed_dim], qkv[..., self.embed_dim :])
        if self.rotary_emb_dim:
            q, kv = self.rotary_emb(q, kv, offset, longest)
        return (q, kv), x

    def _cross(self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        kv = self.Wkv(x if x_kv is None else x_kv)
        if self.return_residual:
            kv, seen = kv
            x = seen if x_kv is None else x
        return self._split(self.Wq(x if mixer_subset is None else x[:, mixer_subset]), kv), x

    def _split(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        if self.dwconv:
            q, kv = self.dwconv_q(q), self.dwconv_kv(kv)
        heads = (self.num_heads, self.head_dim)
        return q.unflatten(-1, heads), kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))

    def _attend(self, inner: nn.Module, *tensors: Tensor, **kwargs: Any) -> Tensor:
        if self.checkpointing:
            context: Tensor = checkpoint(inner, *tensors, use_reentrant=False, **kwargs)
        else:
            context = inner(*tensors, **kwargs)
        return context

    def _generate(self, tensors: tuple[Tensor, ...], inference_params: InferenceParams) -> Tensor:
        """Write k (already rotated) and v after the keys in the cache, and attend to the cache."""
        assert self.layer_idx is not None
        q, kv = tensors if len(tensors) == 2 else (tensors[0][:, :, 0], tensors[0][:, :, 1:])
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            size = (inference_params.max_batch_size, inference_params.max_seqlen)
            caches[self.layer_idx] = self.allocate_inference_cache(*size, kv.dtype)
        first = inference_params.batch_size_offset
        cache = caches[self.layer_idx][first : first + len(q)]
        lengths, inner = inference_params.lengths_per_sample, self.inner_cross_attn
        context: Tensor = decoding.attention_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            k=kv[:, :, 0],
            v=kv[:, :, 1],
            cache_seqlens=inference_params.seqlen_offset if lengths is None else lengths[: len(q)],
            causal=inner.causal,
            window=[None if side < 0 else side for side in getattr(inner, "window_size", (-1, -1))],
            scale=inner.softmax_scale,
            alibi_slopes=getattr(inner, "alibi_slopes", None),
        )
        return context


class Convolution(nn.Conv1d):
    """Causal depthwise convolution over the sequence of (batch, seqlen, width)."""

    def __init__(self, width: int, factory: dict[str, Any]) -> None:
        super().__init__(width, width, kernel_size=3, padding=2, groups=width, **factory)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()
