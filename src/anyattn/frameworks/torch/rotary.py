"""Rotary positions in torch operations, used by the KV cache, `anyattn.nn` and the compat modules."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from . import fastpath

Part = int | slice | EllipsisType  # index along dimension 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first rotary_dim values of x (..., nheads, head_dim) by the angles of `positions` (..., or 1).

        (a, b) -> (a cos - b sin, a sin + b cos)

    Pairs are (0, 1), (2, 3), ... if interleaved, else (0, d/2), (1, d/2 + 1), ... with d = rotary_dim. cos and sin are
    (length, rotary_dim / 2). Computed in float32 (float64 for float64), differentiable in x, cos and sin.
    """
    half: int = cos.shape[-1]
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    cos, sin = cos[positions].unsqueeze(-2).to(wide), sin[positions].unsqueeze(-2).to(wide)  # (..., 1, half)
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


class RotateInPlace(torch.autograd.Function):
    """In-place rotation of parts of x. x may be a leaf that requires a gradient, so it is not marked as dirty."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor, interleaved: bool, parts: Sequence[Part], *tables: Tensor
    ) -> Tensor:
        ctx.save_for_backward(positions, *tables)
        ctx.interleaved, ctx.parts = interleaved, parts
        # detached, because a view of a base is unusable after another part of the base is rotated
        return _turn(x, positions, interleaved, parts, tables).detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        positions, *tables = ctx.saved_tensors
        back = [-table if n % 2 else table for n, table in enumerate(tables)]  # rotates by the opposite angle
        dx = _turn(dout.clone(), positions, ctx.interleaved, ctx.parts, back)
        return dx, None, None, None, *[None] * len(tables)


def _turn(x: Tensor, positions: Tensor, interleaved: bool, parts: Sequence[Part], tables: Sequence[Tensor]) -> Tensor:
    for part, cos, sin in zip(parts, tables[0::2], tables[1::2], strict=True):
        x[:, :, part] = rotate(x[:, :, part], cos, sin, positions, interleaved)
    return x


def rotate_in_place(
    x: Tensor, positions: Tensor, interleaved: bool, parts: Sequence[Part], tables: Sequence[Tensor]
) -> Tensor:
    """Return x with x[:, :, part] rotated in place for each part.

    tables are (cos, sin) of the first part, of the next, ... The result carries the gradient of the rotation. The
    tables get no gradient.
    """
    if torch.is_grad_enabled() and any(table.requires_grad for table in tables):
        raise ValueError(
            "cos and sin must not require a gradient if x is rotated in place. Pass cos.detach() and sin.detach()."
        )
    if torch.compiler.is_compiling():  # Dynamo cannot trace a Function that writes to a view
        copy = _turn(x.clone(), positions, interleaved, parts, tables)
        x.detach().copy_(copy.detach())
        return copy
    turned: Tensor = RotateInPlace.apply(x, positions, interleaved, tuple(parts), *tables)
    return turned


def positions(seqlen: int, offsets: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Return the positions (1 or batch, seqlen) of seqlen queries after `offsets`, one int or one per sequence.

    Raises ValueError if they exceed the tables' `length`. Values on a device or in a graph are clamped instead.
    """
    rows = torch.arange(seqlen, device=device)
    if isinstance(offsets, int):
        if offsets < 0 or offsets + seqlen > length:
            raise ValueError(
                f"seqlen_offsets + seqlen {seqlen} must be from 0 to {length}, the length of cos, "
                f"got offset {offsets}. Pass longer tables."
            )
        return (rows + offsets)[None]
    if offsets.ndim != 1 or offsets.is_floating_point():
        raise ValueError(
            f"seqlen_offsets must be an int or integers (batch,), got {offsets.dtype} {tuple(offsets.shape)}."
        )
    if readable(offsets) and offsets.numel():
        low, high = (int(bound) for bound in offsets.aminmax())
        if low < 0 or high + seqlen > length:
            raise ValueError(
                f"seqlen_offsets + seqlen {seqlen} must be from 0 to {length}, the length of cos, "
                f"got offsets from {low} to {high}."
            )
        return offsets[:, None] + rows
    return (offsets[:, None] + rows).clamp(0, length - 1)


def packed_positions(
    total: int, cu_seqlens: Tensor, max_seqlen: int, offsets: int | Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Return (positions, is_in_sequence), both (total,), of packed sequences."""
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    inside = (sequence >= 0) & (sequence < len(cu_seqlens) - 1)
    sequence = sequence.clamp(0, max(len(cu_seqlens) - 2, 0))
    if readable(cu_seqlens) and len(cu_seqlens) > 1 and int(cu_seqlens.diff().max()) > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least {int(cu_seqlens.diff().max())}, the longest in cu_seqlens, got {max_seqlen}."
        )
    if isinstance(offsets, Tensor) and offsets.shape != (len(cu_seqlens) - 1,):
        raise ValueError(
            f"seqlen_offsets must be ({len(cu_seqlens) - 1},) like the sequences, got {tuple(offsets.shape)}."
        )
    positions(max_seqlen, offsets, length, cu_seqlens.device)  # raises if the longest sequence exceeds the tables
    first = offsets[sequence] if isinstance(offsets, Tensor) else offsets
    return torch.where(inside, rows - cu_seqlens[sequence] + first, 0).clamp(0, length - 1), inside


def readable(x: Tensor) -> bool:
    """Return whether x's values can be read: x is in host memory, and nothing traces or transforms."""
    return x.device.type == "cpu" and fastpath.can_skip_operator((x,))


def frequencies(dim: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """Return base ** (-2 i / dim), float32 (dim / 2,)."""
    return 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


# torch 2.6 cannot tell whether it exports. Every trace makes its own tables there.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class Tables:
    """Cached (cos, sin) of the angles p * base ** (-2 i / dim), float32, extended on demand."""

    def __init__(self, dim: int, base: float) -> None:
        self.dim, self.base = dim, base
        self.cos = self.sin = torch.empty(0, dim // 2)

    def get(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin for at least `length` positions."""
        if _is_exporting():  # a cached table would fix the length in the exported program
            return self._make(length, device)
        if self.cos.shape[0] < length or self.cos.device != device:
            with torch.inference_mode(False):  # the next call may train
                self.cos, self.sin = self._make(max(length, 2 * self.cos.shape[0]), device)
        return self.cos, self.sin

    def _make(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = torch.arange(length, device=device, dtype=torch.float32)
        angles = torch.outer(rows, frequencies(self.dim, self.base, device))
        return angles.cos(), angles.sin()
