"""When plain eager execution may skip the operator and the slow part of autograd.Function.apply.

Measured with torch 2.13: `Function.apply` in setup_context form costs 20 us, the apply of its base class 7 us, an
operator of 28 arguments 4 us. Both are needed only where something watches: a tracer, a functorch transform, a dispatch
mode, a tensor subclass or the profiler. The tests of that are private names of torch; where one is missing, nothing is
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad, profiler

from .kinds import PLAIN

_is_compiling = torch.compiler.is_dynamo_compiling

_any_autocast: Callable[[], bool] | None = getattr(torch._C, "_is_any_autocast_enabled", None)

try:
    _transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
    _modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
    _tracing: Callable[[], bool] = torch._C._is_tracing
    _has_storage: Callable[[Any], bool] = torch._C._has_storage
    AVAILABLE = hasattr(profiler, "_is_profiler_enabled") and hasattr(forward_ad, "_current_level")
except AttributeError:
    AVAILABLE = False


def watched(*, by_profiler: bool = True) -> bool:
    """Return whether something wants to see the operators: a tracer, a transform, a dispatch mode, the profiler."""
    if _is_compiling() or not AVAILABLE or _modes() or _transforms() or _tracing():
        return True
    enabled: bool = profiler._is_profiler_enabled and by_profiler
    return enabled or forward_ad._current_level >= 0


def plain(tensors: Sequence[Any]) -> bool:
    """Whether nothing watches, and these tensors (any may be None) are what they look like."""
    return not watched() and not any(_peculiar(x) for x in tensors if x is not None)


def metadata(tensors: Sequence[Any]) -> tuple[Any, ...] | None:
    """The key of cached plans (the adapter's) if `execute` may have these tensors as they are, else None."""
    if watched():
        return None
    key: list[Any] = []
    append = key.append
    try:
        for x in tensors:
            if x is None:
                append(None)
                continue
            if type(x) not in PLAIN or x.is_neg() or x.is_meta or not _has_storage(x):  # _peculiar, without a call
                return None
            strides = x.stride()
            if not strides or strides[-1] != 1:
                return None  # the operators' kernels know what to copy
            key += (x.shape, strides, x.dtype, x.device)
    except RuntimeError:  # a nested tensor has no strides
        return None
    torch.get_num_threads()  # a new thread's first such call tells OpenMP what torch.set_num_threads said
    return tuple(key)


def _peculiar(x: Any) -> bool:
    """A subclass, or values that only the dispatcher knows how to read."""
    return type(x) not in PLAIN or x.is_neg() or x.is_meta or not _has_storage(x)


def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", 0) >= 0


def maybe_autocast() -> bool:
    """False if autocast is off for every device."""
    return _is_compiling() or _any_autocast is None or _any_autocast()


def break_inside_transforms() -> None:
    """Dynamo traces an autograd.Function inside torch.func transforms as if it had no backward (seen with torch 2.13).

    A graph break makes it run the function eagerly, as it should be; with fullgraph=True it raises. Eager: no effect.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
        torch._dynamo.graph_break()


def distinct(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays for a Function that Dynamo traces: it refuses one tensor in two places (q = k = v, one cu_seqlens)."""
    if not torch.compiler.is_compiling():
        return arrays
    seen: list[Any] = []
    for x in arrays:
        twice = x is not None and any(x is other for other in seen)
        seen.append(x.view_as(x) if twice else x)
    return tuple(seen)


def base_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Function.apply without its support of functorch and of default arguments."""
    owner: Any = super(torch.autograd.Function, function) if AVAILABLE else function
    apply: Callable[..., Any] = owner.apply
    return apply
