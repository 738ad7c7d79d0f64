"""Checks for torch.jit.trace, which cannot record Python code that reads a size or a value.

While it traces, sizes are tensors, and a Python decision that depends on one is fixed in the trace. Functions that make
such decisions read sizes here, without the tracer's warning, and record a check. A trace run with another value raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_torch: Any = torch._C


def active() -> bool:
    """Return whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and _torch._is_tracing()


def sizes(x: Tensor) -> tuple[int, ...]:
    """Return the shape as integers."""
    return tuple(_untraced(lambda: x.shape)) if active() else tuple(x.shape)


def element(name: str, x: Tensor) -> Any:
    """Return the value of a tensor of one element, and make the trace raise for another value."""
    value = _untraced(x.item)
    Fixed.apply(x, value, name)
    return value


def fix_shape(name: str, x: Tensor) -> None:
    """Make the trace raise for another shape of this tensor."""
    Fixed.apply(x, sizes(x), name)


def fix_size(name: str, x: Tensor, axis: int) -> None:
    """Make the trace raise for another size along an axis of this tensor."""
    size: Any = x.shape[axis]  # a tensor while tracing
    element(name, size)


class Fixed(torch.autograd.Function):
    """Check inside a trace, as a Function, because a trace keeps a Function even if its result is unused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, traced: Any, name: str) -> Tensor:
        shape = isinstance(traced, tuple)
        found = sizes(x) if shape else _untraced(x.item)
        if found != traced:
            what = f"have the shape {traced}" if shape else f"be {traced}"
            raise ValueError(f"{name} must {what}, as when this function was traced, got {found}. Trace it again.")
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, None


def _untraced(read: Any) -> Any:
    """Return the result of `read`, without recording it."""
    state = _torch._get_tracing_state()
    _torch._set_tracing_state(None)
    try:
        return read()
    finally:
        _torch._set_tracing_state(state)
