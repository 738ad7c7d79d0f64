"""`flash_attn.ops.triton.rotary` in torch operations, for tensors of any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .....frameworks.torch_tools import dense, rotary


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate the first rotary_dim values of each head by the angles of its position.

    Args:
        x: (batch, seqlen, nheads, head_dim), or (total, nheads, head_dim) with cu_seqlens.
        cos: (length, rotary_dim / 2), rotary_dim <= head_dim.
        sin: (length, rotary_dim / 2).
        seqlen_offsets: position of the first row, an int or (batch,).
        cu_seqlens: (batch + 1,), cumulative lengths of packed sequences. Rows outside every sequence are not changed.
        max_seqlen: longest length, needed with cu_seqlens.
        interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        inplace: write to x and return it.
        conjugate: rotate by the opposite angle.

    Returns:
        The rotated x, in its dtype. Differentiable unless in place (`layers.rotary` has gradients for that).

    Raises:
        ValueError: a shape does not fit, or a position is outside the tables.

    >>> import torch
    >>> x, cos, sin = torch.ones(1, 4, 2, 8), torch.zeros(4, 2), torch.ones(4, 2)
    >>> apply_rotary(x, cos, sin)[0, 0, 0]
    tensor([-1., -1.,  1.,  1.,  1.,  1.,  1.,  1.])
    """
    cos, sin, positions = prepare(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    sin = -sin if conjugate else sin
    if not inplace:
        return rotary.rotate(x, cos, sin, positions, interleaved)
    with torch.no_grad():
        return x.copy_(rotary.rotate(x, cos, sin, positions, interleaved))


def prepare(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cos, sin, positions), checked."""
    x, cos, sin = dense("x", x), dense("cos", cos), dense("sin", sin)
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos and sin must be (length, rotary_dim / 2), rotary_dim <= head_dim {x.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if cu_seqlens is None:
        if x.ndim != 4:
            raise ValueError(f"x must be (batch, seqlen, nheads, head_dim), got {tuple(x.shape)}.")
        if max_seqlen is not None and max_seqlen < x.shape[1]:
            raise ValueError(f"max_seqlen must be at least {x.shape[1]}, x's length, got {max_seqlen}.")
        positions = rotary.positions(x.shape[1], seqlen_offsets, len(cos), x.device)
        if len(positions) not in (1, len(x)):
            raise ValueError(f"seqlen_offsets must be ({len(x)},) like x's batch, got ({len(positions)},).")
        return cos, sin, positions
    if x.ndim != 3 or max_seqlen is None:
        raise ValueError(
            "cu_seqlens needs x (total, nheads, head_dim) and max_seqlen, "
            f"got x {tuple(x.shape)}, max_seqlen {max_seqlen}."
        )
    positions, inside = rotary.packed_positions(len(x), cu_seqlens, int(max_seqlen), seqlen_offsets, len(cos))
    # Rows outside every sequence are rotated by an angle of 0, stored after the tables.
    cos, sin = torch.cat((cos, torch.ones_like(cos[:1]))), torch.cat((sin, torch.zeros_like(sin[:1])))
    return cos, sin, torch.where(inside, positions, len(cos) - 1)
