"""Unusual forms of valid arguments. Each form has the value of the usual one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


class Label(Tensor):
    """Subclass of Tensor that only adds a name."""


class Meaning(Tensor):
    """Subclass that defines its own functions, so that its memory may not hold its values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


Forms = Iterator[tuple[str, Any]]


def reals(value: float) -> Forms:
    """Yield forms of a real number that float16 holds exactly."""
    for kind in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        yield kind.__name__, kind(value)
    yield "array", np.array(value, np.float32)
    yield "array of one", np.array([value])
    yield "tensor", torch.tensor(value)
    yield "half tensor of one", torch.tensor([value], dtype=torch.float16)
    yield "parameter", torch.nn.Parameter(torch.tensor(value), requires_grad=False)
    if value == int(value):
        yield "int", int(value)
        yield "int64", np.int64(value)


def integers(value: int) -> Forms:
    """Yield forms of an integer."""
    for kind in (np.int8, np.int32, np.int64, np.uint16):
        if value >= 0 or kind is not np.uint16:
            yield kind.__name__, kind(value)
    yield "array", np.array(value)
    yield "tensor", torch.tensor(value)
    yield "int32 tensor of one", torch.tensor([value], dtype=torch.int32)


def flags(value: bool) -> Forms:
    """Yield forms of a truth value."""
    yield "int", int(value)
    yield "bool_", np.bool_(value)
    yield "array", np.array(value)
    yield "tensor", torch.tensor(value)
    yield "int tensor of one", torch.tensor([int(value)])


def pairs(value: tuple[int | None, int | None]) -> Forms:
    """Yield forms of a pair of integers."""
    yield "list", list(value)
    for name in ("int64", "tensor"):
        make = np.int64 if name == "int64" else torch.tensor
        yield f"of {name}", tuple(None if side is None else make(side) for side in value)
    if None not in value:
        yield "tensor", torch.tensor(value)
        yield "array", np.array(value)


def tables(value: Tensor) -> Forms:
    """Yield forms of a table of integers, boundaries and lengths for example."""
    for dtype in (torch.int64, torch.int16, torch.uint8):
        yield str(dtype), value.to(dtype)
    yield "every other element", torch.stack((value, value + 99), -1)[..., 0]
    yield "label", value.as_subclass(Label)


def layouts(value: Tensor) -> Forms:
    """Yield tensors with the same values in other layouts. Floating-point values are surrounded by NaN."""
    filling = torch.nan if value.is_floating_point() else 1
    doubled = value.new_full([2 * size for size in value.shape], filling)
    every_other = doubled[tuple(slice(None, None, 2) for _ in value.shape)]
    every_other.copy_(value)
    yield "every other element", every_other
    order = list(reversed(range(value.ndim)))
    yield "axes reversed", value.permute(order).contiguous().permute(order)
    moved = value.new_full((value.numel() + 3,), filling)[3:].view(value.shape)
    moved.copy_(value)
    yield "moved", moved
    yield "label", value.clone().as_subclass(Label)
    if value.is_floating_point():
        yield "parameter", torch.nn.Parameter(value.clone(), requires_grad=False)
        yield "negative view", torch._neg_view(-value)


def aliases(value: Tensor) -> Forms:
    """Yield tensors of the same shape whose elements share memory: expanded along each axis, and overlapping rows."""
    for axis, size in enumerate(value.shape):
        if size > 1:
            yield f"expanded along {axis}", value.narrow(axis, 0, 1).expand(value.shape)
    if value.ndim > 2 and value.numel():
        strides = [1] * value.ndim
        strides[-3] = 2
        flat = value.flatten()[: 1 + sum((n - 1) * step for n, step in zip(value.shape, strides, strict=True))]
        yield "overlapping", flat.clone().as_strided(value.shape, strides)


def refused(value: Tensor) -> Forms:
    """Yield tensors whose memory does not hold their values."""
    yield "functions of its own", value.clone().as_subclass(Meaning)
    yield "sparse", value.to_sparse()
    if value.ndim > 1:
        yield "nested", torch.nested.as_nested_tensor(list(value.detach().unbind()), layout=torch.jagged)
