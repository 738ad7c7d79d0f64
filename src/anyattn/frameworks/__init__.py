"""The frameworks: one row for each kind of array. `framework_of` is the door of `api` and `compat` to all below.

A framework is imported when its first array comes. The loaders import by statements, which torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

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


def _numpy() -> Framework:
    from . import numpy

    return numpy


def _torch() -> Framework:
    from .torch import functional

    return functional


def _vulkan() -> Framework:
    from . import vulkan_array

    return vulkan_array


KINDS = (
    Kind("numpy.ndarray", _is_numpy, _numpy),
    Kind("torch.Tensor", _is_torch, _torch),
    Kind("DeviceArray", _is_vulkan, _vulkan),
)
# An import statement in every call takes longer than the search for its plan.
_loaded: dict[str, Framework] = {}


def framework_of(array: Any, name: str = "q") -> Framework:
    """Return the framework of this kind of array; TypeError names the argument if there is none."""
    for kind in KINDS:
        if kind.recognises(array):
            return _loaded.get(kind.name) or _load(kind)
    *most, last = (kind.name for kind in KINDS)
    raise TypeError(f"{name} must be a {', a '.join(most)} or a {last}; got {type(array).__name__}")


def _load(kind: Kind) -> Framework:
    _loaded[kind.name] = framework = kind.load()
    return framework
