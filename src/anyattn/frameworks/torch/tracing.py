"""What torch.jit.trace cannot record: Python code that reads a size or a value.

While it traces, sizes are tensors, and a Python decision that depends on one is fixed in the trace. Functions that
decide read sizes here, without the tracer's warning, and record a check: a trace that is run with another value raises.
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
    """Return the shape in integers."""
    return tuple(_untraced(lambda: x.shape)) if active() else tuple(x.shape)


def element(name: str, x: Tensor) -> Any:
    """Return the value of a tensor of one element, and let the trace raise where it is another one."""
    value = _untraced(x.item)
    Fixed.apply(x, value, name)
    return value


def fix_shape(name: str, x: Tensor) -> None:
    """Let the trace raise where this tensor comes in another shape."""
    Fixed.apply(x, sizes(x), name)


def fix_size(name: str, x: Tensor, axis: int) -> None:
    """Let the trace raise where this tensor comes with another size along an axis."""
    size: Any = x.shape[axis]  # a tensor, while it traces
    element(name, size)


class Fixed(torch.autograd.Function):
    """A check inside a trace, which keeps a Function although nobody uses its result."""

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
    """Return what `read` returns while nothing is recorded."""
    state = _torch._get_tracing_state()
    _torch._set_tracing_state(None)
    try:
        return read()
    finally:
        _torch._set_tracing_state(state)
