"""The frameworks: one row for each kind of array. `framework_of` is the door of `api` and `compat` to all below.

A framework is imported when its first array comes (`loaded.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import loaded
from .base import Framework


class Kind(NamedTuple):
    """A kind of array: how to recognise one without importing its framework, and the framework."""

    name: str
    recognises: Callable[[Any], bool]
    load: Callable[[], Framework]


def _is_numpy(array: Any) -> bool:
    return isinstance(array, np.ndarray)


def _is_torch(array: Any) -> bool:
    return hasattr(type(array), "__torch_function__")


def _is_vulkan(array: Any) -> bool:
    return hasattr(array, "__anyattn_vulkan__")


KINDS = (
    Kind("numpy.ndarray", _is_numpy, lambda: loaded.numpy),
    Kind("torch.Tensor", _is_torch, lambda: loaded.torch),
    Kind("DeviceArray", _is_vulkan, lambda: loaded.vulkan),
)


def framework_of(array: Any, name: str = "q") -> Framework:
    """Return the framework of this kind of array; TypeError names the argument if there is none."""
    for kind in KINDS:
        if kind.recognises(array):
            return kind.load()
    *most, last = (kind.name for kind in KINDS)
    raise TypeError(f"{name} must be a {', a '.join(most)} or a {last}; got {type(array).__name__}")
