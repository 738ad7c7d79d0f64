"""Scalars passed as tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import tracing


def element(name: str, x: Tensor) -> Any:
    """Return the value of a tensor of one element.

    Raises:
        TypeError: the tensor has more elements, requires a gradient (scalars have none), or holds no value (meta
            tensor).
    """
    shape = tracing.sizes(x)
    if math.prod(shape) != 1:
        raise TypeError(f"{name} must be one number, got a tensor of shape {shape}.")
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} must not require a gradient: {name} has none. Pass {name}.detach(), or multiply q by it instead."
        )
    if torch.compiler.is_compiling():
        return x.item()
    if tracing.active():
        return tracing.element(name, x)
    try:
        return x.item()
    except RuntimeError as error:  # a meta or fake tensor, or one that torch.func maps over
        raise TypeError(f"{name} must be one number, got a tensor whose value cannot be read here: {error}") from error
