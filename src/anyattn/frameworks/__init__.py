"""The frameworks, one for each kind of array. `framework_of` is the door of `api` and `compat` to all below.

A framework is imported when its first array comes (`loaded.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import loaded

if TYPE_CHECKING:
    from .base import Framework

ARRAYS = {"numpy": "numpy.ndarray", "torch": "torch.Tensor", "vulkan": "DeviceArray"}  # framework -> kind of array


def framework_of(array: Any, name: str = "q") -> Framework:
    """Return the framework of this kind of array; TypeError names the argument if there is none.

    A kind is recognised without an import of its framework.
    """
    if isinstance(array, np.ndarray):
        return loaded.numpy
    if hasattr(type(array), "__torch_function__"):
        return loaded.torch
    if hasattr(array, "__anyattn_vulkan__"):
        return loaded.vulkan
    *most, last = ARRAYS.values()
    raise TypeError(f"{name} must be a {', a '.join(most)} or a {last}; got {type(array).__name__}")
