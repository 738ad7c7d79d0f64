"""Score functions of torch: tracing of functions that read tensors, whose gradients flow through the call.

A mode intercepts reads at traced indices, `bias[h, q_idx]`. Everything else that the function computes with tensors
runs as usual, before the call, and is part of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...definition.inputs import Inputs
from ...definition.options import Options
from ...definition.score.expressions import trace_once
from ...definition.score.graph import BOOL, FLOAT, INT
from ...definition.score.symbol import Partial, Symbol, Trace, read, refuse
from ...definition.score.trace import Traced
from ...definition.score.trace import trace as trace_functions
from ..score_arguments import Call, Use, with_traced
from ..score_functions import Functions, with_gradients
from . import fastpath, ops
from .kinds import PLAIN, dense

_RANDOM = frozenset((
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
    *("multinomial", "poisson", "binomial", "uniform", "random", "exponential", "geometric", "cauchy", "log_normal"),
))  # fmt: skip


class _Reads(TorchFunctionMode):
    """Mode in which a tensor can be read at traced indices, and a number that is not known yet as a captured one."""

    def __init__(self, recording: Trace) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is Tensor.__getitem__ and _is_traced(arguments[1]):
            return Partial(arguments[0])[arguments[1]]
        if function is Tensor.item and not fastpath.can_skip_operator(arguments[:1]):  # a number in torch.compile
            return read(Partial(arguments[0].reshape(())), ())
        if getattr(function, "__name__", "").rstrip("_") in _RANDOM:
            refuse(f"{function.__name__} draws its numbers once, not for every pair", "Draw them outside the function.")
        return function(*arguments, **(keywords or {}))


def _is_traced(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(one, (Symbol, Partial)) for one in parts)


@torch.compiler.disable  # the functions are called with symbols, which Dynamo does not know
def with_functions(inputs: Inputs, options: Options, score_mod: Any, mask_mod: Any, use: Use) -> Call:
    """Return a call with score_mod and mask_mod, differentiable in the tensors that they read."""
    q = dense("q", inputs.q)
    found = traced(score_mod, mask_mod, ops.compute_dtype(q))
    if not use.captured_gradients and not torch.is_grad_enabled():
        found = with_gradients(found, lambda x: False)

    def convert(x: Any, floats: bool) -> Tensor:
        ready = _tensor(x, q)
        return ready.to(ops.compute_dtype(q)) if floats else ready

    def join(tensors: Sequence[Any], floats: bool) -> Tensor:
        ready = [convert(x, floats) for x in tensors]
        return torch.cat([(x if floats else _integers(x)).reshape(-1) for x in ready])

    functions = Functions(*found, join, convert, _host)
    return with_traced(functions, inputs, options, use)


def _host(x: Any) -> Any:
    """Return the values of a tensor in host memory, None for others."""
    if not isinstance(x, Tensor):
        return np.asarray(x)
    if x.device.type != "cpu" or not fastpath.can_skip_operator((x,)):
        return None
    return (x.detach() if x.requires_grad else x).numpy()


def traced(score_mod: Any, mask_mod: Any, compute: torch.dtype = torch.float32) -> Traced:
    """Return the graph of functions that read tensors. compute: the dtype of scores."""
    if fastpath.is_observed() or fastpath.has_function_modes():
        return _trace(score_mod, mask_mod, compute)
    return trace_once((score_mod, mask_mod), _metadata, partial(_trace, compute=compute))


def _trace(score_mod: Any, mask_mod: Any, compute: torch.dtype) -> Traced:
    return trace_functions(score_mod, mask_mod, _Reads, {FLOAT: compute, INT: torch.int32, BOOL: torch.bool})


def _metadata(x: Any) -> Any:
    """Return what the graph of a function depends on if it reads a tensor; None for anything else."""
    return (x.shape, x.dtype, x.requires_grad) if type(x) in PLAIN and not x.is_nested else None


def _tensor(x: Any, q: Tensor) -> Tensor:
    if not isinstance(x, Tensor):  # a NumPy array: in anyattn.captured, or computed for the call
        return torch.from_numpy(x).to(q.device) if isinstance(x, np.ndarray) else torch.as_tensor(x, device=q.device)
    if x.device != q.device:
        raise ValueError(f"a captured tensor must be on q's device {q.device}, got {x.device}.")
    return dense("a captured tensor", x)


def _integers(x: Tensor) -> Tensor:
    small = x.to(torch.int32)
    if x.dtype not in (torch.int64, torch.uint32, torch.uint64) or x.device.type != "cpu" or not x.numel():
        return small
    wide = x.to(torch.int64)  # torch cannot compare unsigned numbers; those from 2^63 become negative
    least = -(2**31) if x.dtype is torch.int64 else 0
    if fastpath.can_skip_operator((x,)):
        low, high = (int(bound) for bound in wide.aminmax())
        if low < least or high >= 2**31:
            raise ValueError(f"a captured tensor of integers must fit in int32, got {low} to {high}.")
    else:  # the values are not known yet
        fits = (wide == small) & (wide >= least)
        torch._assert_async(fits.all(), "a captured tensor of integers must fit in int32.")
    return small
