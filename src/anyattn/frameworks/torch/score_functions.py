"""Score functions of torch: tracing of functions that read tensors, whose gradients flow through the call.

A mode intercepts reads at traced indices, `bias[h, q_idx]`. Everything else that the function computes with tensors
runs as usual, before the call, and is part of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...definition.score.symbol import Partial, Symbol, Trace
from ...definition.score.trace import Traced
from ...definition.score.trace import trace as trace_functions
from ..score_functions import Packed, Simplified, pack
from . import ops
from .kinds import dense


class _Reads(TorchFunctionMode):
    """Mode in which a tensor can be read at traced indices."""

    def __init__(self, recording: Trace) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is Tensor.__getitem__ and _is_traced(arguments[1]):
            return Partial(arguments[0])[arguments[1]]
        return function(*arguments, **(keywords or {}))


def _is_traced(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(one, (Symbol, Partial)) for one in parts)


@torch.compiler.disable  # the functions are called with symbols, which Dynamo does not know
def trace(score_mod: Any, mask_mod: Any, q: Any) -> tuple[Packed, Simplified | None]:
    """Return the text of the functions' graph and their tensors, differentiable in the captured tensors."""
    q = dense("q", q)
    found = traced(score_mod, mask_mod)
    if not torch.is_grad_enabled():
        arrays = tuple([array._replace(gradient=False) for array in found.graph.arrays])
        found = found._replace(graph=found.graph._replace(arrays=arrays))

    def join(tensors: Sequence[Any], floats: bool) -> Tensor:
        ready = [_tensor(x, q) for x in tensors]
        if floats:
            return torch.cat([x.to(ops.compute_dtype(q)).reshape(-1) for x in ready])
        return torch.cat([_integers(x).reshape(-1) for x in ready])

    return pack(found, q.shape[-2], join)


def traced(score_mod: Any, mask_mod: Any) -> Traced:
    """Return the graph of functions that read tensors."""
    return trace_functions(score_mod, mask_mod, _Reads)


def _tensor(x: Any, q: Tensor) -> Tensor:
    if not isinstance(x, Tensor):  # a NumPy array in anyattn.captured
        return torch.as_tensor(x, device=q.device)
    if x.device != q.device:
        raise ValueError(f"a captured tensor must be on q's device {q.device}, got {x.device}.")
    return dense("a captured tensor", x)


def _integers(x: Tensor) -> Tensor:
    if x.dtype in (torch.int64, torch.uint32) and x.device.type == "cpu" and x.numel():
        low, high = (int(bound) for bound in x.aminmax())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"a captured tensor of integers must fit in int32, got {low} to {high}.")
    return x.to(torch.int32)
