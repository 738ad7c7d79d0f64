"""Rules for torch.vmap: samples become one call with a larger batch, or a loop of calls if they cannot be combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...definition.inputs import FIELDS, HEADS, SCALES, SCORES, STATE
from ...definition.passes import BACKWARD, FORWARD, Pass
from . import ops

Dims = Sequence["int | None"]
Results = tuple[Tensor, ...]
Mapped = dict[str, tuple[Tensor, "int | None"]]  # arrays that were passed, and their sample dimension


def fold(samples: int, given: Mapped, *, gradients: bool = False) -> dict[str, Tensor] | None:
    """Return the arrays of all samples as one call's (batch entry n * batch + b), or None if a loop is needed.

    `gradients`: the results hold one gradient per sample for every array, including arrays that all samples share.
    """
    mapped = {name for name, (_, dim) in given.items() if dim is not None}
    if any(_needs_loop(name, name in mapped or gradients) for name in given):
        return None
    paged = bool(given.keys() & {"block_table", "cache_batch_idx"})
    if paged and (gradients or mapped & {"k", "v"}):
        return None
    q = _front(samples, *given["q"])
    folded: dict[str, Tensor] = {}
    for name, (x, dim) in given.items():
        if name in FIELDS and FIELDS[name].kind in (SCORES, HEADS) and not _is_shared(name):
            per_sample = gradients and FIELDS[name].gradient
            score = _fold_score(samples, q.shape[1], x, dim, per_sample=per_sample)
            if score is None:
                return None
            folded[name] = score
        elif _is_shared(name) or (paged and name in ("k", "v")):
            folded[name] = x
        else:
            folded[name] = _front(samples, x, dim).flatten(0, 1)
    return folded


def _is_shared(name: str) -> bool:
    """Return whether an array has one value per head for all sequences, so samples in one call cannot differ."""
    return name in FIELDS and FIELDS[name].kind == HEADS and all("batch" not in shape for shape in FIELDS[name].shapes)


def _needs_loop(name: str, differs: bool) -> bool:
    """Return whether an array prevents one call: lengths in one table, a dropout state, scales, or a value per head."""
    if name not in FIELDS:
        return False
    field = FIELDS[name]
    packed = any("batch + 1" in shape for shape in field.shapes)
    return packed or field.kind in (STATE, SCALES) or (_is_shared(name) and differs)


def _fold_score(samples: int, batch: int, x: Tensor, dim: int | None, *, per_sample: bool) -> Tensor | None:
    """Return bias or mask (1 or batch, ...), or slopes (nheads,) or (batch, nheads), for samples * batch entries."""
    if dim is None and not per_sample and (x.ndim == 1 or x.shape[0] == 1):
        return x
    x = _front(samples, x, dim)
    if x.ndim == 2:
        return x.unsqueeze(1).expand(-1, batch, -1).flatten(0, 1)
    if per_sample and x.shape[1] != batch:
        return None  # the gradient of a sample is a sum over its batch
    return x.expand(samples, batch, *x.shape[2:]).flatten(0, 1)


def _front(samples: int, x: Tensor, dim: int | None) -> Tensor:
    """Return a view with the sample dimension first."""
    return x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)


def unfold(samples: int, results: Sequence[Tensor]) -> Results:
    """Return the results of a folded call with the sample dimension first. Absent results are empty and stay empty."""
    return tuple(
        x.unflatten(0, (samples, x.shape[0] // samples)) if x.ndim > 1 else x.expand(samples, 0) for x in results
    )


def loop(samples: int, dims: Dims, inputs: Sequence[Any], call: Callable[..., Sequence[Tensor]]) -> Results:
    """Return the results of one call per sample, stacked along a new first dimension."""
    results = [
        call(*[x if dim is None else x.select(dim, n) for x, dim in zip(inputs, dims, strict=True)])
        for n in range(samples)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def forward(
    samples: int, dims: Dims, arrays: Sequence[Any], call: Callable[..., Results], *, separate: bool = False
) -> tuple[Results, tuple[int, int]]:
    """Return (results, their dims) of the forward pass `call(*arrays)`, in one call or one call per sample.

    separate: one call per sample, because a score function counts the entries of the batch.
    """
    folded = None if separate else fold(samples, _given(FORWARD.inputs, arrays, dims))
    if folded is None:
        return loop(samples, dims, arrays, call), (0, 0)
    return unfold(samples, call(*[folded.get(name) for name in FORWARD.inputs])), (0, 0)


def backward(
    samples: int, dims: Dims, arrays: Sequence[Any], call: Callable[..., Results], *, separate: bool = False
) -> tuple[Results, tuple[int, ...]]:
    """Return (results, their dims) of the backward pass: one gradient per sample of every array."""
    given = _given(BACKWARD.inputs, arrays, dims)
    folded = None if separate else fold(samples, given, gradients=True)
    if folded is None:
        return loop(samples, dims, arrays, call), tuple(0 for _ in BACKWARD.outputs)
    results = unfold(samples, call(*[folded.get(name) for name in BACKWARD.inputs]))
    return results, tuple(0 for _ in BACKWARD.outputs)


def derivative(
    pass_: Pass, samples: int, dims: Dims, arrays: Sequence[Any], call: Callable[..., Results]
) -> tuple[Results, tuple[int, ...]]:
    """Return the same for the inputs of a pass of tangents: one call per sample."""
    return loop(samples, [*dims], arrays, call), tuple(0 for _ in pass_.outputs)


def _given(names: Sequence[str], arrays: Sequence[Any], dims: Dims) -> Mapped:
    """Return the arrays that are not None. The dispatcher may have removed the dims of trailing defaults."""
    padded = (*dims, *(None for _ in arrays))
    return {name: (x, dim) for name, x, dim in zip(names, arrays, padded, strict=False) if x is not None}


@torch.library.register_vmap(f"{ops.NAMESPACE}::forward", lib=ops.library)
def _forward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Results, tuple[int, int]]:
    inputs, options, backend = ops.forward_arguments(arguments)
    q, k, v, extras = inputs
    dims = _array_dims(in_dims, FORWARD.inputs)
    return forward(
        *(info.batch_size, dims, (q, k, v, *extras), lambda *xs: ops.forward(*xs, *options, backend)),
        separate=options.score != "",
    )


@torch.library.register_vmap(f"{ops.NAMESPACE}::backward", lib=ops.library)
def _backward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Results, tuple[int, ...]]:
    saved, inputs, options, backend, wants = ops.backward_arguments(arguments)
    q, k, v, extras = inputs
    arrays, dims = (q, k, v, *saved, *extras), _array_dims(in_dims, BACKWARD.inputs)
    return backward(
        *(info.batch_size, dims, arrays, lambda *xs: ops.backward(*xs, *options, backend, *wants)),
        separate=options.score != "",
    )


def _array_dims(in_dims: Dims, names: Sequence[str]) -> Dims:
    """Return one dimension per array. Dims of options are dropped, and removed trailing dims are None."""
    return [dim for _, dim in zip(names, (*in_dims, *(None for _ in names)), strict=False)]
