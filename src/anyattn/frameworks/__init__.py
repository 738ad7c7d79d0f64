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
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        return loaded.jax
    *most, last = ARRAYS.values()
    raise TypeError(f"{name} must be a {', a '.join(most)} or a {last}, got {type(array).__name__}")
