"""Conditions under which eager execution may skip the operator and the slow part of autograd.Function.apply.

Measured with torch 2.13: `Function.apply` in setup_context form costs 20 us, the apply of its base class 7 us, and an
operator with 28 arguments 4 us. Both are needed only if something observes the operators: a tracer, a functorch
transform, a dispatch mode, a tensor subclass or the profiler. The tests for observers use private names of torch. If
one of these names is missing, nothing is skipped, and a forward pass and its tangent are two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad, profiler

from .kinds import PLAIN

_is_compiling = torch.compiler.is_dynamo_compiling

_function_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_function_stack", None)
_any_autocast: Callable[[], bool] | None = getattr(torch._C, "_is_any_autocast_enabled", None)
_SEES_TRANSFORMS = hasattr(torch._C, "_are_functorch_transforms_active")

try:
    _transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
    _modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
    _tracing: Callable[[], bool] = torch._C._is_tracing
    _has_storage: Callable[[Any], bool] = torch._C._has_storage
    _is_tangent_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled
    _interpreters: Callable[[], Any] = torch._C._functorch.get_interpreter_stack
    _FORWARD_MODE, _VMAP = torch._C._functorch.TransformType.Jvp, torch._C._functorch.TransformType.Vmap
    AVAILABLE = hasattr(profiler, "_is_profiler_enabled") and hasattr(forward_ad, "_current_level")
except AttributeError:
    AVAILABLE = False


def is_observed(*, by_profiler: bool = True) -> bool:
    """Return whether something observes the operators: a tracer, a transform, a dispatch mode or the profiler."""
    if _is_compiling() or not AVAILABLE or _modes() or _transforms() or _tracing():
        return True
    enabled: bool = profiler._is_profiler_enabled and by_profiler
    return enabled or forward_ad._current_level >= 0


def has_function_modes() -> bool:
    """Return False if no TorchFunctionMode sees calls of torch's functions."""
    return _function_modes is None or _function_modes() > 0


def can_skip_operator(tensors: Sequence[Any]) -> bool:
    """Return whether nothing observes the operators and the memory of these tensors holds their values.

    None is allowed.
    """
    return not is_observed() and not any(_needs_dispatcher(x) for x in tensors if x is not None)


def metadata(tensors: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the adapter's key of cached plans if `execute` can use these tensors unchanged, else None."""
    if is_observed():
        return None
    key: list[Any] = []
    append = key.append
    try:
        for x in tensors:
            if x is None:
                append(None)
                continue
            # As in _needs_dispatcher, without a call.
            if type(x) not in PLAIN or x.is_neg() or x.is_meta or not _has_storage(x):
                return None
            strides = x.stride()
            if not strides or strides[-1] != 1:
                return None  # the operators' kernels make the copies
            key += (x.shape, strides, x.dtype, x.device)
    except RuntimeError:  # a nested tensor has no strides
        return None
    torch.get_num_threads()  # a thread's first such call passes the number of torch.set_num_threads to OpenMP
    return tuple(key)


def _needs_dispatcher(x: Any) -> bool:
    """Return whether x is a subclass, or holds values that only the dispatcher can read."""
    return type(x) not in PLAIN or x.is_neg() or x.is_meta or not _has_storage(x)


def is_forward_mode() -> bool:
    """Return whether tensors may carry tangents."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def unpack_tangents(arrays: Sequence[Any]) -> tuple[list[Any], list[Any]] | None:
    """Return the arrays without tangents, and their tangents (None: zeros); None if no array has a tangent to unpack.

    It is also None where a forward pass must stay apart from its tangents: under vmap, because all tangents of `jacfwd`
    share the forward pass; under a tracer, because `linearize` calls the traced tangent many times; and for leaves of a
    backward pass outside torch.func, because the gradient of an array with a tangent has a tangent.
    """
    if not AVAILABLE or _is_compiling() or _modes() or _tracing() or not _is_tangent_enabled():
        return None
    transformed = _transforms()
    if not (_is_forward_mode_innermost() if transformed else _is_without_gradient(arrays)):
        return None
    pairs = [(x, None) if x is None else forward_ad.unpack_dual(x) for x in arrays]
    tangents = [tangent for _, tangent in pairs]
    given = [tangent for tangent in tangents if tangent is not None]
    if not given or (not transformed and any(_needs_dispatcher(x) for x in given)):  # for example, gradcheck's vmap
        return None
    return [x if tangent is None else primal for x, (primal, tangent) in zip(arrays, pairs, strict=True)], tangents


def _is_forward_mode_innermost() -> bool:
    """Return whether no transform of torch.func hides the tangents of forward mode, and none is vmap."""
    keys: list[Any] = [interpreter.key() for interpreter in _interpreters()]
    return bool(keys[-1] == _FORWARD_MODE) and _VMAP not in keys


def _is_without_gradient(arrays: Sequence[Any]) -> bool:
    return not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in arrays)


def may_autocast() -> bool:
    """Return False if autocast is off for every device."""
    return _is_compiling() or _any_autocast is None or _any_autocast()


def outside_graphs(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Return `apply`, which breaks the graph of torch.compile where Dynamo would lose derivatives.

    Dynamo traces an autograd.Function without its derivatives inside transforms of torch.func that differentiate, and
    where tensors carry tangents (seen with torch 2.13). After a graph break the function runs eagerly, which is right.
    With fullgraph=True the break raises. Eager execution is not affected.
    """
    if not torch.compiler.is_compiling():
        return apply
    if is_forward_mode():
        outside: Callable[..., Any] = torch._dynamo.disable(apply)
        return outside
    if torch.is_grad_enabled() and (not _SEES_TRANSFORMS or torch._C._are_functorch_transforms_active()):
        torch._dynamo.graph_break()
    return apply


def distinct(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arrays without repeated tensors (q = k = v), because Dynamo rejects a Function that gets one twice."""
    if not torch.compiler.is_compiling():
        return arrays
    seen: list[Any] = []
    for x in arrays:
        twice = x is not None and any(x is other for other in seen)
        seen.append(x.view_as(x) if twice else x)
    return tuple(seen)


def base_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return Function.apply without its support for functorch and for default arguments."""
    owner: Any = super(torch.autograd.Function, function) if AVAILABLE else function
    apply: Callable[..., Any] = owner.apply
    return apply
