"""torch.ops.flash_attn: the four functions below autograd as operators, under the real package's names.

They are composite: tracing goes through them to anyattn's own operators, whose fakes serve, and what is compiled never
sees an operator that mutates. Registered only where the real package is not installed, since it would find its names
taken, whichever of the two is imported first.
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
    """Whether `import flash_attn` would find a package that is not this one."""
    module = sys.modules.get("flash_attn")
    spec = getattr(module, "__spec__", None) if module else importlib.util.find_spec("flash_attn")
    return bool(spec and spec.origin and Path(spec.origin).parent != Path(__file__).parent)


def register() -> torch.library.Library | None:
    """Defines the operators; they live as long as what is returned. None where they are the real package's."""
    if real_package() or hasattr(torch.ops.flash_attn, "_flash_attn_forward"):
        return None
    library = torch.library.Library("flash_attn", "FRAGMENT")
    # torch 2.6 reads annotations among its own names: their signatures say Tensor and built-in types alone
    for name, mutated in _MUTATED.items():
        function = getattr(_private, name)
        library.define(name + torch.library.infer_schema(function, mutates_args=mutated))
        library.impl(name, function, "CompositeImplicitAutograd")
    return library


library = register()
