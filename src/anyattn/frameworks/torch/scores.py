"""Scores and weights of torch tensors: tile by tile, or in plain differentiable operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...definition.inputs import GRADIENTS, Inputs
from ...definition.options import Options
from ...runtime import execute
from .. import scores as formulas
from . import fastpath, ops
from .adapter import adapter


def scores(inputs: Inputs, options: Options, queries: Any, stage: formulas.Stage, lse: Tensor | None) -> Tensor:
    """Return a stage of the scores from prepared inputs.

    In plain eager execution, memory is the result and one tile. If gradients are recorded, or something traces or
    transforms the operations, one tile is the whole result, in the compute dtype.
    """
    q, arrays, traced = inputs.q, formulas.named(inputs), fastpath.is_observed(by_profiler=False)
    described = {name: adapter.describe(x) for name, x in arrays.items()}
    sizes = formulas.check(described, options, None if lse is None else adapter.describe(lse))
    if not traced:
        execute.check_values(adapter, inputs, options)
    if lse is not None:
        _check_gradient(arrays, lse)
        arrays["lse"] = lse
    arrays["i"] = torch.arange(sizes.seqlen_q, device=q.device)
    arrays["j"] = torch.arange(sizes.seqlen_k, device=q.device)
    chosen, kind = _queries(queries, sizes.seqlen_q, q.device), ops.compute_dtype(q)
    functions = formulas.Functions(torch.exp, torch.tanh, torch.where, _listed, lambda x: x.to(kind))
    if traced or (torch.is_grad_enabled() and any(x.requires_grad for x in arrays.values())):
        whole: Tensor = formulas.tile(functions, sizes, arrays, chosen, slice(0, sizes.seqlen_k), stage)
        return whole.to(q.dtype)
    shape = (sizes.batch, sizes.nheads, arrays["i"][chosen].shape[0], sizes.seqlen_k)
    out: Tensor = q.new_empty(shape)
    for rows, keys in formulas.tiles(shape):
        part = formulas.part(chosen, rows, sizes.seqlen_q)
        out[:, :, rows, keys] = formulas.tile(functions, sizes, arrays, part, keys, stage)
    return out


def _listed(slots: Tensor, width: int, nheads: int) -> Tensor:
    # The last column collects slots outside the tile.
    found = torch.zeros(*slots.shape[:-1], width + 1, dtype=torch.bool, device=slots.device)
    found = found.scatter(-1, slots.long(), True)[..., :-1]
    return found if found.shape[1] == 1 else found.repeat_interleave(nheads // found.shape[1], 1)


def _check_gradient(arrays: Mapping[str, Tensor], lse: Tensor) -> None:
    """Raise if gradients would be recorded without the part that flows through lse."""
    if not torch.is_grad_enabled() or lse.requires_grad:
        return
    for name in ("q", "k", *GRADIENTS):
        if name in arrays and arrays[name].requires_grad:
            raise ValueError(
                f"lse must require a gradient because {name} does, got an lse that does not. "
                f"Pass lse as attention(..., return_lse=True) returned it, or call under torch.no_grad()."
            )


def _queries(queries: Any, seqlen_q: int, device: torch.device) -> Any:
    """Return a slice or an index tensor."""
    if queries is None:
        return slice(None)
    if isinstance(queries, slice):
        formulas.check_slice(queries)
        return queries
    indices = torch.as_tensor(queries, device=device)
    integers = not (indices.is_floating_point() or indices.is_complex() or indices.dtype is torch.bool)
    formulas.check_queries(tuple(indices.shape), str(indices.dtype).removeprefix("torch."), integers=integers)
    indices = indices.to(torch.int64)
    if indices.device.type == "cpu" and indices.shape[0] and fastpath.can_skip_operator((indices,)):
        low, high = indices.aminmax()
        formulas.check_range(int(low), int(high), seqlen_q)
    return indices
