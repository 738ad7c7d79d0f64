"""torch.ops.flash_attn: the four functions below autograd as operators, with the real package's names.

They are composite: tracing passes through them to anyattn's own operators and their fakes, so compiled code never
contains an operator that mutates. They are registered only if the real package is not installed, because otherwise the
package would find its names taken.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from . import _private

_BACKWARD = ("dq", "dk", "dv")
_MUTATED = {
    "_flash_attn_forward": (),
    "_flash_attn_varlen_forward": (),
    "_flash_attn_backward": _BACKWARD,
    "_flash_attn_varlen_backward": _BACKWARD,
}


def real_package() -> bool:
    """Return whether `import flash_attn` would find a package other than this one."""
    module = sys.modules.get("flash_attn")
    spec = getattr(module, "__spec__", None) if module else importlib.util.find_spec("flash_attn")
    return bool(spec and spec.origin and Path(spec.origin).parent != Path(__file__).parent)


def register() -> torch.library.Library | None:
    """Define the operators, which exist as long as the returned library. None if the real package is installed."""
    if real_package() or hasattr(torch.ops.flash_attn, "_flash_attn_forward"):
        return None
    library = torch.library.Library("flash_attn", "FRAGMENT")
    # torch 2.6 evaluates annotations in its own namespace, so the signatures use only Tensor and built-in types.
    for name, mutated in _MUTATED.items():
        function = getattr(_private, name)
        library.define(name + torch.library.infer_schema(function, mutates_args=mutated))
        library.impl(name, function, "CompositeImplicitAutograd")
    return library


library = register()
