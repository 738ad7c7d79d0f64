"""Frameworks as attributes. Each framework is imported on first use and is an attribute afterwards.

An import statement in every call would take longer than finding the plan. torch.compile traces both; it would recompile
for a dictionary that grows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Framework


def __getattr__(name: str) -> Framework:
    framework: Framework
    if name == "numpy":
        from . import numpy

        framework = numpy
    elif name == "torch":
        from .torch import functional

        framework = functional
    elif name == "jax":
        from .jax import functional as jax_arrays

        framework = jax_arrays
    elif name == "vulkan":
        from . import vulkan_array

        framework = vulkan_array
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = framework
    return framework
