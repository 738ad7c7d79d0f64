"""Attention layers for PyTorch: `Attention`, with grouped heads, rotary positions and a `KVCache`.

This module is imported when `anyattn.nn` is first used, because it needs torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import api, decoding
from .arguments import Window
from .definition.dtypes import QUANTISED
from .frameworks.torch_tools import rotary


class KVCache:
    """Keys and values of one layer for the tokens processed so far, in memory that is allocated once.

    `Attention.cache` makes a cache that fits a layer.

    Args:
        batch: number of sequences.
        slots: number of tokens that each sequence can hold.
        nheads_kv: number of key and value heads.
        head_dim: size of a key head.
        head_dim_v: size of a value head; default head_dim.
        device: device of the layer's activations.
        dtype: dtype of the layer's activations; or "int8", "float8_e4m3fn" or "float8_e5m2" (or the dtype of torch) for
            a quantised cache, which takes half or a quarter of the memory.

    Attributes:
        k: (batch, slots, nheads_kv, head_dim), rotated if the layer has rotary positions.
        v: (batch, slots, nheads_kv, head_dim_v).
        k_scale: float32 (batch, slots, nheads_kv), scales of a quantised cache; otherwise None.
        v_scale: like k_scale.
        seqlens: int32 (batch,), tokens in use. Lower an entry to drop tokens, or set it to 0 to start a new sequence.

    >>> import torch, anyattn.nn
    >>> cache = KVCache(batch=2, slots=64, nheads_kv=2, head_dim=8)
    >>> cache.k.shape, cache.seqlens.tolist()
    (torch.Size([2, 64, 2, 8]), [0, 0])
    >>> KVCache(batch=2, slots=64, nheads_kv=2, head_dim=8, dtype="int8").k_scale.shape
    torch.Size([2, 64, 2])
    """

    def __init__(
        self,
        batch: int,
        slots: int,
        nheads_kv: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        kind = _dtype(dtype)
        sizes = batch, slots, nheads_kv
        self.k = torch.zeros(*sizes, head_dim, device=device, dtype=kind)
        self.v = torch.zeros(*sizes, head_dim_v or head_dim, device=device, dtype=kind)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if kind is not None and kind.itemsize == 1:
            self.k_scale, self.v_scale = (torch.zeros(*sizes, device=device) for _ in range(2))
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Append k and v, then attend to the whole cache with `anyattn.attention_with_kvcache`.

        Args:
            q: (batch, seqlen_q, nheads, head_dim).
            k: (batch, seqlen_new, nheads_kv, head_dim).
            v: (batch, seqlen_new, nheads_kv, head_dim_v).
            **options: keywords of `anyattn.attention_with_kvcache`.

        Raises:
            ValueError: the cache is full, and nothing was written; or a gradient is required. Decode under
                `torch.no_grad()`.
        """
        out: Tensor = decoding.attention_with_kvcache(
            q,
            self.k,
            self.v,
            k=k,
            v=v,
            cache_seqlens=self.seqlens,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            **options,
        )
        self.seqlens = self.seqlens + k.shape[1]
        return out


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of torch for a dtype or a name of `QUANTISED`."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None) if dtype in QUANTISED else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype or one of {', '.join(QUANTISED)}, got {dtype!r}.")
    return found


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with its four projections.

        q, k, v = x W_q, context W_k, context W_v
        out = concat_h(attention(q_h, k_(h // group), v_(h // group))) W_out

    Args:
        width: size of input and output.
        nheads: number of query heads.
        nheads_kv: number of key and value heads, a divisor of nheads; default nheads.
        head_dim: size of a query or key head; default width / nheads.
        head_dim_v: size of a value head; default head_dim.
        bias: add a bias in each projection.
        causal: each query attends only to keys at or before its own position.
        window: (left, right), inclusive, None: unbounded.
        scale: default head_dim ** -0.5.
        softcap: 0: off.
        sink: add one learnable logit per head to the softmax denominator, initially 0.
        alibi: add -slope * distance to the scores, with the slopes of Press et al. (2022).
        rotary_dim: number of values of each head that rotary positions rotate, even; 0: none.
        rotary_base: base of the angles p * rotary_base ** (-2 i / rotary_dim).
        rotary_interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        dropout_p: dropout probability of the attention probabilities, in training only.
        backend: as for `anyattn.attention`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    state_dict: q.weight, k.weight, v.weight, out.weight, and the biases and `sink` if the layer has them.

    Raises:
        ValueError: sizes do not fit together.

    >>> import torch, anyattn.nn
    >>> layer = anyattn.nn.Attention(64, nheads=8, nheads_kv=2, causal=True, rotary_dim=8)
    >>> x = torch.randn(2, 16, 64)
    >>> out = layer(x)  # training
    >>> with torch.no_grad():  # generation
    ...     cache = layer.cache(batch=2, slots=32)
    ...     steps = [layer(x[:, :10], cache=cache), layer(x[:, 10:], cache=cache)]
    >>> torch.allclose(torch.cat(steps, 1), out, atol=1e-5)
    True
    """

    def __init__(
        self,
        width: int,
        nheads: int,
        nheads_kv: int | None = None,
        *,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        bias: bool = False,
        causal: bool = False,
        window: Window = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sink: bool = False,
        alibi: bool = False,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        dropout_p: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.nheads = width, nheads
        self.nheads_kv = nheads if nheads_kv is None else nheads_kv
        if head_dim is None and width % nheads:
            raise ValueError(f"width must be a multiple of nheads ({nheads}), got {width}. Or pass head_dim.")
        self.head_dim = width // nheads if head_dim is None else head_dim
        self.head_dim_v = self.head_dim if head_dim_v is None else head_dim_v
        self.causal, self.window, self.scale, self.softcap = causal, window, scale, softcap
        self.rotary_dim, self.rotary_base, self.rotary_interleaved = rotary_dim, rotary_base, rotary_interleaved
        self.dropout_p, self.backend = dropout_p, backend
        self._check()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q = nn.Linear(width, nheads * self.head_dim, bias=bias, **factory)
        self.k = nn.Linear(width, self.nheads_kv * self.head_dim, bias=bias, **factory)
        self.v = nn.Linear(width, self.nheads_kv * self.head_dim_v, bias=bias, **factory)
        self.out = nn.Linear(nheads * self.head_dim_v, width, bias=bias, **factory)
        self.sink = nn.Parameter(torch.zeros(nheads, **factory)) if sink else None
        # Plain attributes, because buffers would lose precision when the layer is cast.
        self._slopes = torch.tensor(alibi_slopes(nheads)) if alibi else None
        self._tables = rotary.Tables(rotary_dim, rotary_base)

    def _check(self) -> None:
        if self.nheads_kv < 1 or self.nheads % self.nheads_kv:
            raise ValueError(f"nheads must be a multiple of nheads_kv ({self.nheads_kv}), got {self.nheads}.")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim must be even, from 0 to head_dim ({self.head_dim}), got {self.rotary_dim}.")
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}.")

    def cache(self, batch: int, slots: int, dtype: torch.dtype | str | None = None) -> KVCache:
        """Return an empty cache with the sizes of this layer.

        Args:
            batch: number of sequences.
            slots: number of tokens that each sequence can hold.
            dtype: dtype of the activations, or of a quantised cache as for `KVCache`; default: the dtype of the
                parameters.
        """
        weight = self.k.weight
        sizes = (batch, slots, self.nheads_kv, self.head_dim, self.head_dim_v)
        return KVCache(*sizes, device=weight.device, dtype=dtype or weight.dtype)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        seqused: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Compute attention on x; returns (batch, seqlen, width), or (total, width) with cu_seqlens.

        Args:
            x: (batch, seqlen, width), or (total, width) with cu_seqlens.
            context: (batch, seqlen_k, width), source of keys and values; default x. Not combined with rotary positions.
            bias: added to the scores, as for `anyattn.attention`.
            mask: boolean mask of the scores, as for `anyattn.attention`.
            seqused: (batch,), number of tokens of context (of x without context) in use; the rest is padding.
            cu_seqlens: (batch + 1,), cumulative lengths of the sequences packed in x.
            max_seqlen: longest length in cu_seqlens, if known.
            cache: append to this cache and attend to all of it. The layer must be causal, and dropout must be off.

        Raises:
            ValueError: arguments exclude each other, or the cache is full.
        """
        self._check_call(context, bias, mask, seqused, cu_seqlens, cache)
        source = x if context is None else context
        q = self.q(x).unflatten(-1, (self.nheads, self.head_dim))
        k = self.k(source).unflatten(-1, (self.nheads_kv, self.head_dim))
        v = self.v(source).unflatten(-1, (self.nheads_kv, self.head_dim_v))
        if cache is not None:
            out = self._decode(q, k, v, cache, bias=bias, mask=mask)
        elif cu_seqlens is not None:
            q, k = self._rotate(q, k, cu_seqlens)
            options = {**self._options(x), "dropout_p": self.dropout_p if self.training else 0.0}
            out = api.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        else:
            q, k = self._rotate(q, k)
            options = {**self._options(x), "dropout_p": self.dropout_p if self.training else 0.0}
            out = api.attention(q, k, v, bias=bias, mask=mask, seqused_k=seqused, **options)
        projected: Tensor = self.out(out.flatten(-2))
        return projected

    def _check_call(
        self,
        context: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        seqused: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KVCache | None,
    ) -> None:
        if context is not None and (self.rotary_dim or cu_seqlens is not None or cache is not None):
            raise ValueError("context cannot be combined with rotary_dim, cu_seqlens or cache.")
        if cu_seqlens is not None and any(x is not None for x in (bias, mask, seqused, cache)):
            raise ValueError("cu_seqlens cannot be combined with bias, mask, seqused or cache.")
        if cache is not None and (not self.causal or seqused is not None):
            raise ValueError("cache needs a layer with causal=True, and cannot be combined with seqused.")
        if cache is not None and self.training and self.dropout_p:
            raise ValueError("cache cannot be combined with dropout. Call eval() before decoding.")

    def _options(self, x: Tensor) -> dict[str, Any]:
        if self._slopes is not None and self._slopes.device != x.device:
            self._slopes = self._slopes.to(x.device)
        return {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "sink": self.sink,
            "alibi_slopes": self._slopes,
            "backend": self.backend,
        }

    def _rotate(self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return q and k rotated at their positions, which start at 0 in each sequence."""
        if not self.rotary_dim:
            return q, k
        seqlen = q.shape[0] if cu_seqlens is not None else q.shape[1]
        cos, sin = self._tables.get(seqlen, q.device)
        if cu_seqlens is None:
            positions = rotary.positions(seqlen, 0, cos.shape[0], q.device)
        else:
            positions, _ = rotary.packed_positions(seqlen, cu_seqlens, seqlen, 0, cos.shape[0])
        q, k = (rotary.rotate(x, cos, sin, positions, self.rotary_interleaved) for x in (q, k))
        return q, k

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, **scores: Tensor | None) -> Tensor:
        options = {**self._options(q), **scores}
        if self.rotary_dim:  # q and k are rotated when they are appended
            cos, sin = self._tables.get(cache.k.shape[1], q.device)
            options.update(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=self.rotary_interleaved)
        return cache.attend(q, k, v, **options)


def alibi_slopes(nheads: int) -> list[float]:
    """Return ALiBi's slopes (Press et al., 2022).

    For a power of two they are 2 ** (-8 (h + 1) / nheads). Otherwise the slopes of the next power of two fill the list.

    Args:
        nheads: number of query heads.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    whole = 1 << (nheads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    return slopes if whole == nheads else slopes + alibi_slopes(2 * whole)[0::2][: nheads - whole]
