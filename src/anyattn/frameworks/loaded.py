"""The frameworks as attributes: each is imported when it is first used, and an attribute from then on.

An import statement in every call takes longer than the search for its plan. torch.compile traces both; a dictionary
that fills up would make it compile again.
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
    elif name == "vulkan":
        from . import vulkan_array

        framework = vulkan_array
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = framework
    return framework
