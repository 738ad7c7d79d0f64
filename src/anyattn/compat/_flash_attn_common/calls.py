"""Convert arguments of flash_attn and call anyattn through the Framework protocol."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ...arguments import make_request
from ...definition.inputs import Saved
from ...frameworks import framework_of

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
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return framework_of(q).backward(Saved(out, lse, dout, dlse), inputs, options, seed, backend)


def integer(name: str, value: Any) -> int:
    """An int from anything that is one: NumPy's, or a tensor of one element."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None


def maximum(name: str, value: Any) -> int | None:
    """A longest length, which may be unknown."""
    return None if value is None else integer(name, value)


def pair(name: str, value: Any) -> tuple[int, int]:
    """Two integers from a tuple, a list or a tensor."""
    if len(value) != 2:
        raise ValueError(f"{name} must have two elements (left, right); got {value!r}")
    return integer(name, value[0]), integer(name, value[1])


def window_bounds(window_size: Any, causal: bool, limits: tuple[int, int]) -> Bounds:
    """(left, right) of flash_attn 2 and 3: negative, or from a limit on, means unbounded."""
    left, right = pair("window_size", window_size)
    last = 0 if causal else None if right < 0 or right >= limits[1] else right
    return (None if left < 0 or left >= limits[0] else left), last


def store(into: Tensor | None, value: Tensor) -> Tensor:
    """The value, written to a buffer of the caller's if there is one."""
    with torch.no_grad():
        return value if into is None else into.copy_(value)


def only_speed(num_splits: Any, most: int) -> None:
    """Checks the one argument that only steers a GPU's speed, and that callers get wrong."""
    if not 0 <= integer("num_splits", num_splits) <= most:
        raise ValueError(f"num_splits must be 0 (automatic) to {most}; got {num_splits}")


def rows_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a packed array: its sequence, its index there, and whether it belongs to any."""
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    inside = (rows >= cu_seqlens[0]) & (rows < cu_seqlens[-1])
    sequence = sequence.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    return sequence, rows - cu_seqlens[sequence], inside
