"""Convert arguments of flash_attn and call anyattn through the Framework protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import make_request
from ...definition.inputs import Gradients, Saved
from ...frameworks import framework_of
from ...frameworks.torch_tools import dense
from ...scalars import flag, integer

Bounds = tuple["int | None", "int | None"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, bounds: Bounds, return_lse: bool = False, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) from arguments of `attention_forward`, with autograd; `return_lse`: lse has a gradient too.

    `bounds` replace causal and window. Unlike these they may be negative, which is meaningful in flash_attn 4.
    """
    inputs, options, seed, backend, _ = make_request(q, k, v, bounds, **arguments)
    return framework_of(q).attention(inputs, options, seed, return_lse, backend, want_lse=True)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    bounds: Bounds,
    dlse: Tensor | None = None,
    **arguments: Any,
) -> Gradients:
    """Compute the gradients from inputs and results of `attend`.

    lse may be +inf for queries without keys.
    """
    inputs, options, seed, backend, _ = make_request(q, k, v, bounds, **arguments)
    lse = dense("lse", lse).masked_fill(lse == torch.inf, -torch.inf)
    return framework_of(q).backward(Saved(out, lse, dout, dlse), inputs, options, seed, backend)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return the two elements (left, right) of a tuple, a list, an array or a tensor."""
    if not hasattr(value, "__len__") or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must have two elements (left, right), got {value!r}.")
    return value[0], value[1]


def unpack(name: str, packed: Tensor, ndim: int) -> tuple[Tensor, ...]:
    """Return views of q, k, v or k, v, which are packed along the third dimension from the end."""
    packed = dense(name, packed)
    if packed.ndim != ndim or packed.shape[-3] != len(name):
        batch = "batch, seqlen" if ndim == 5 else "total"
        raise ValueError(f"{name} must be ({batch}, {len(name)}, nheads, head_dim), got {tuple(packed.shape)}.")
    return packed.unbind(-3)


def window_bounds(window_size: Any, causal: Any, limits: tuple[int, int] | None = None) -> Bounds:
    """Return (left, right) of flash_attn 2 and 3. Negative sides, and sides of at least `limits`, are unbounded."""
    left, right = (integer("window_size", side) for side in pair("window_size", window_size))
    most_left, most_right = limits or (left + 1, right + 1)
    last = 0 if flag("causal", causal) else None if right < 0 or right >= most_right else right
    return (None if left < 0 or left >= most_left else left), last


def store(into: Tensor | None, value: Tensor) -> Tensor:
    """Return the value, written to the caller's buffer if there is one."""
    with torch.no_grad():
        return value if into is None else into.copy_(value)


def check_num_splits(num_splits: Any, most: int) -> None:
    """Check num_splits, which is only a hint for GPUs."""
    if not 0 <= integer("num_splits", num_splits) <= most:
        raise ValueError(f"num_splits must be 0 (automatic) to {most}, got {num_splits}.")


def rows_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row of a packed array: its sequence, its index in it, and whether it belongs to a sequence."""
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    inside = (rows >= cu_seqlens[0]) & (rows < cu_seqlens[-1])
    sequence = sequence.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    return sequence, rows - cu_seqlens[sequence], inside
