"""What the public functions do for each kind of array: `of_numpy`, `of_torch`, `of_vulkan`.

Each is imported when it is first asked for and an attribute from then on, since an import statement in every call takes
longer than the search for its plan. torch.compile traces both.
"""

from __future__ import annotations

from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "of_numpy":
        from . import numpy

        globals()[name] = numpy
    elif name == "of_torch":
        from .torch import functional

        globals()[name] = functional
    elif name == "of_vulkan":
        from . import vulkan_array

        globals()[name] = vulkan_array
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module: ModuleType = globals()[name]
    return module
