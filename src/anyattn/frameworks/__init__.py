"""Frameworks, one for each kind of array. `api` and `compat` call them through `framework_of`.

A framework is imported when its first array is passed (`loaded.py`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from . import loaded

if TYPE_CHECKING:
    from .base import Framework

# Framework -> kind of array.
ARRAYS = {"numpy": "numpy.ndarray", "torch": "torch.Tensor", "jax": "jax.Array", "vulkan": "DeviceArray"}


def framework_of(array: Any, name: str = "q") -> Framework:
    """Return the framework of this kind of array; raise a TypeError that names the argument if there is none.

    The kind of an array is recognised without importing the framework.
    """
    if isinstance(array, np.ndarray):
        return loaded.numpy
    if hasattr(type(array), "__torch_function__"):
        return loaded.torch
    if hasattr(array, "__anyattn_vulkan__"):
        return loaded.vulkan
    if is_jax(array):
        return loaded.jax
    *most, last = ARRAYS.values()
    raise TypeError(f"{name} must be a {', a '.join(most)} or a {last}, got {type(array).__name__}.")


def is_jax(array: Any, *, with_values: bool = False) -> bool:
    """Return whether this is an array of JAX, a tracer included unless its values are needed. JAX is not imported."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.Array) and not (with_values and isinstance(array, jax.core.Tracer))
