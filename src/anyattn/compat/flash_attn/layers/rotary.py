"""`flash_attn.layers.rotary`: rotary positions with gradients, in place or not, for tensors on any device.

In-place rotation accepts a leaf that requires a gradient, as upstream does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....frameworks.torch_tools import rotary
from ..ops.triton.rotary import apply_rotary, prepare


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate x like `ops.triton.rotary.apply_rotary`, with gradients also in place.

    Args:
        x: (batch, seqlen, nheads, head_dim), or (total, nheads, head_dim) with cu_seqlens.
        cos: (length, rotary_dim / 2), rotary_dim <= head_dim.
        sin: (length, rotary_dim / 2).
        interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        inplace: write to x and return it.
        seqlen_offsets: position of the first row, an int or (batch,).
        cu_seqlens: (batch + 1,), cumulative lengths of packed sequences.
        max_seqlen: longest length, needed with cu_seqlens.

    Returns:
        The rotated x.

    >>> import torch
    >>> x = torch.ones(1, 4, 2, 8, requires_grad=True)
    >>> apply_rotary_emb(x, torch.zeros(4, 4), torch.ones(4, 4), inplace=True).sum().backward()
    >>> x.grad[0, 0, 0]
    tensor([ 1.,  1.,  1.,  1., -1., -1., -1., -1.])
    """
    if not inplace:
        return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved)
    cos, sin, positions = prepare(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    return rotary.rotate_in_place(x, positions, interleaved, [...], (cos, sin))


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate row i of x by row i of cos and sin.

    Args:
        x: (batch, seqlen, nheads, head_dim).
        cos: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).
        sin: in cos's shape.
        interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...

    Returns:
        The rotated x.
    """
    batch, seqlen = x.shape[:2]
    if cos.shape[:-1] not in ((seqlen,), (batch, seqlen)):
        raise ValueError(
            f"cos must be ({seqlen}, rotary_dim / 2) or ({batch}, {seqlen}, rotary_dim / 2), got {tuple(cos.shape)}."
        )
    rows = torch.arange(cos[..., 0].numel(), device=x.device).view(-1, seqlen)
    flat = (cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))
    return rotary.rotate(x, *prepare(x, *flat)[:2], rows, interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of a packed qkv in place.

    Args:
        qkv: (batch, seqlen, 3, nheads, head_dim), or with num_heads_q (batch, seqlen, num_heads_q + 2 * num_heads_k,
            head_dim).
        cos: (length, rotary_dim / 2), rotary_dim <= head_dim.
        sin: (length, rotary_dim / 2).
        cos_k: table for k; default cos.
        sin_k: table for k; default sin.
        interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        seqlen_offsets: position of the first row, an int or (batch,).
        num_heads_q: number of query heads, for a qkv with 4 dimensions.

    Returns:
        qkv.
    """
    if qkv.ndim == 5:
        if qkv.shape[2] != 3 or num_heads_q is not None:
            raise ValueError(
                "qkv must be (batch, seqlen, 3, nheads, head_dim), without num_heads_q, or have 4 dimensions, "
                f"got {tuple(qkv.shape)}, num_heads_q {num_heads_q}."
            )
        parts: list[rotary.Part] = [0, 1]
    else:
        if (
            qkv.ndim != 4
            or num_heads_q is None
            or not 0 < num_heads_q < qkv.shape[2]
            or (qkv.shape[2] - num_heads_q) % 2
        ):
            raise ValueError(
                "qkv with 4 dimensions must be (batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim), "
                f"got {tuple(qkv.shape)}, num_heads_q {num_heads_q}."
            )
        heads = (qkv.shape[2] + num_heads_q) // 2
        parts = [slice(0, num_heads_q), slice(num_heads_q, heads)]
    if (cos_k is None) != (sin_k is None):
        raise ValueError("cos_k and sin_k must be passed together, got one of them.")
    cos, sin, positions = prepare(qkv[:, :, parts[0]], cos, sin, seqlen_offsets)
    cos_k, sin_k = (
        (cos, sin) if cos_k is None or sin_k is None else prepare(qkv[:, :, parts[1]], cos_k, sin_k, seqlen_offsets)[:2]
    )
    return rotary.rotate_in_place(qkv, positions, interleaved, parts, (cos, sin, cos_k, sin_k))


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate k of a packed kv in place.

    Args:
        kv: (batch, seqlen, 2, nheads, head_dim).
        cos: (length, rotary_dim / 2), rotary_dim <= head_dim.
        sin: (length, rotary_dim / 2).
        interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        seqlen_offsets: position of the first row, an int or (batch,).

    Returns:
        kv.
    """
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (batch, seqlen, 2, nheads, head_dim), got {tuple(kv.shape)}.")
    cos, sin, positions = prepare(kv[:, :, 0], cos, sin, seqlen_offsets)
    return rotary.rotate_in_place(kv, positions, interleaved, [0], (cos, sin))


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al., "RoFormer", 2021) with cached tables; with scale_base XPos (Sun et al., 2022).

    The angles of position p are p * base ** (-2 i / dim). XPos multiplies q by scale ** ((p - c) / scale_base) and
    divides k by it, where c is the middle of the tables. Keep max_seqlen constant during a generation.

    Args:
        dim: number of values of each head that are rotated.
        base: base of the frequencies.
        interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        scale_base: enables XPos; 512 is usual.
        device: device of the buffers.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", rotary.frequencies(dim, self.base, device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else self._scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _scale(self, device: torch.device | str | None) -> Tensor:
        return (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Extend the tables to at least this length.

        Angles are computed in float32, whatever the dtype of the module.
        """
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and (cached.device, cached.dtype) == (torch.device(device or "cpu"), dtype)
            and not (self.training and not torch.compiler.is_compiling() and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        rows = torch.arange(seqlen, device=device, dtype=torch.float32)
        exact = self.inv_freq.dtype is torch.float32 and self.inv_freq.device == rows.device
        angles = torch.outer(rows, self.inv_freq if exact else rotary.frequencies(self.dim, self.base, device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self._scale(device) ** ((rows - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate in place; return qkv, or q and kv.

        Args:
            qkv: as for `apply_rotary_emb_qkv_`; with kv only q (batch, seqlen, nheads, head_dim).
            kv: (batch, seqlen, 2, nheads_kv, head_dim).
            seqlen_offset: position of the first row, an int or (batch,). A tensor needs max_seqlen.
            max_seqlen: required length of the tables; default seqlen + seqlen_offset.
            num_heads_q: number of query heads, for a qkv with 4 dimensions.
        """
        if max_seqlen is None:
            if not isinstance(seqlen_offset, int):
                raise ValueError("max_seqlen must be passed if seqlen_offset is a tensor, got None.")
            max_seqlen = qkv.shape[1] + seqlen_offset
        self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        assert cos is not None and sin is not None
        flags: dict[str, Any] = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, num_heads_q=num_heads_q, **flags)
        q = apply_rotary_emb(qkv, cos, sin, inplace=True, **flags)
        return q, apply_rotary_emb_kv_(kv, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, **flags)
