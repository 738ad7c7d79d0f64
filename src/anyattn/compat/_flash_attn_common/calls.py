"""Convert arguments of flash_attn and call anyattn through the Framework protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import make_request
from ...definition.inputs import Saved
from ...frameworks import framework_of
from ...frameworks.torch_tools import dense
from ...scalars import flag, integer

Bounds = tuple["int | None", "int | None"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, bounds: Bounds, return_lse: bool = False, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) from arguments of `attention_forward`, with autograd, through lse too if `return_lse`.

    `bounds` stand for causal and window; unlike those they may be negative, which means something in flash_attn 4.
    """
    inputs, options, seed, backend = make_request(q, k, v, bounds, **arguments)
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
) -> tuple[Any, ...]:
    """(dq, dk, dv, dbias, dsink) from what `attend` was given and returned; lse may hold +inf for rows without keys."""
    inputs, options, seed, backend = make_request(q, k, v, bounds, **arguments)
    lse = dense("lse", lse).masked_fill(lse == torch.inf, -torch.inf)
    return framework_of(q).backward(Saved(out, lse, dout, dlse), inputs, options, seed, backend)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return the two elements (left, right) of a tuple, a list, an array or a tensor."""
    if not hasattr(value, "__len__") or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must have two elements (left, right), got {value!r}")
    return value[0], value[1]


def window_bounds(window_size: Any, causal: Any, limits: tuple[int, int] | None = None) -> Bounds:
    """Return (left, right) of flash_attn 2 and 3, where negative means unbounded, and so does a limit or more."""
    left, right = (integer("window_size", side) for side in pair("window_size", window_size))
    most_left, most_right = limits or (left + 1, right + 1)
    last = 0 if flag("causal", causal) else None if right < 0 or right >= most_right else right
    return (None if left < 0 or left >= most_left else left), last


def store(into: Tensor | None, value: Tensor) -> Tensor:
    """The value, written to a buffer of the caller's if there is one."""
    with torch.no_grad():
        return value if into is None else into.copy_(value)


def only_speed(num_splits: Any, most: int) -> None:
    """Checks the one argument that only steers a GPU's speed, and that callers get wrong."""
    if not 0 <= integer("num_splits", num_splits) <= most:
        raise ValueError(f"num_splits must be 0 (automatic) to {most}, got {num_splits}")


def rows_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a packed array: its sequence, its index there, and whether it belongs to any."""
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    inside = (rows >= cu_seqlens[0]) & (rows < cu_seqlens[-1])
    sequence = sequence.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    return sequence, rows - cu_seqlens[sequence], inside
