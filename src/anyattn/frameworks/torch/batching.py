"""torch.vmap: the samples become one call with a larger batch, or a loop of calls where that means something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...definition.problem import INPUTS, TABLES
from . import ops

Dims = Sequence["int | None"]
Results = tuple[Tensor, ...]


def fold(samples: int, dims: Dims, arrays: ops.Arrays, *, gradients: bool = False) -> ops.Arrays | None:
    """The arrays of all samples as those of one call (batch entry n * batch + b), or None where only a loop is right.

    `gradients`: the results hold one gradient per sample of every array, of those that the samples share as well.
    """
    given = {name: (x, dim) for name, x, dim in zip(INPUTS, arrays, dims, strict=True) if x is not None}
    mapped = {name for name, (_, dim) in given.items() if dim is not None}
    if given.keys() & {"cu_seqlens_q", "cu_seqlens_k", "rng_state"} or "sink" in (given if gradients else mapped):
        return None
    paged = bool(given.keys() & {"block_table", "cache_batch_idx"})
    if paged and (gradients or mapped & {"k", "v"}):
        return None
    q = _front(samples, *given["q"])
    folded: dict[str, Tensor | None] = {}
    for name, (x, dim) in given.items():
        if name in ("bias", "mask", "alibi_slopes"):
            folded[name] = _fold_score(samples, q.shape[1], x, dim, per_sample=gradients and name == "bias")
            if folded[name] is None:
                return None
        elif name == "sink" or (paged and name in ("k", "v")):
            folded[name] = x
        else:
            assert name in ("q", "k", "v", *TABLES)
            folded[name] = _front(samples, x, dim).flatten(0, 1)
    return tuple(folded.get(name) for name in INPUTS)


def _fold_score(samples: int, batch: int, x: Tensor, dim: int | None, *, per_sample: bool) -> Tensor | None:
    """bias, mask (1 or batch, ...) or slopes (nheads,), (batch, nheads) for samples * batch entries."""
    if dim is None and not per_sample and (x.ndim == 1 or x.shape[0] == 1):
        return x
    x = _front(samples, x, dim)
    if x.ndim == 2:
        return x.unsqueeze(1).expand(-1, batch, -1).flatten(0, 1)
    if per_sample and x.shape[1] != batch:
        return None  # a sample's gradient is a sum over its batch
    return x.expand(samples, batch, *x.shape[2:]).flatten(0, 1)


def _front(samples: int, x: Tensor, dim: int | None) -> Tensor:
    """A view with the samples in front."""
    return x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)


def unfold(samples: int, results: Sequence[Tensor]) -> Results:
    """The results of a folded call, samples in front; absent ones are empty and stay so."""
    return tuple(
        x.unflatten(0, (samples, x.shape[0] // samples)) if x.ndim > 1 else x.expand(samples, 0) for x in results
    )


def loop(samples: int, dims: Dims, inputs: Sequence[Any], call: Callable[..., Sequence[Tensor]]) -> Results:
    """The results of one call per sample, stacked in front."""
    results = [
        call(*[x if dim is None else x.select(dim, n) for x, dim in zip(inputs, dims, strict=True)])
        for n in range(samples)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def forward(
    samples: int, dims: Dims, arrays: ops.Arrays, call: Callable[..., Results]
) -> tuple[Results, tuple[int, int]]:
    """(results, their dims) of `call(*arrays)`, one call or one per sample."""
    folded = fold(samples, dims, arrays)
    if folded is None:
        return loop(samples, dims, arrays, call), (0, 0)
    return unfold(samples, call(*folded)), (0, 0)


def backward(
    samples: int, dims: Dims, tensors: Sequence[Any], call: Callable[..., Results]
) -> tuple[Results, tuple[int, ...]]:
    """The same for `call(dout, *arrays, out, lse, dlse)`: one gradient per sample of every array."""
    dout, *arrays, out, lse, dlse = tensors
    folded = fold(samples, dims[1:-3], tuple(arrays), gradients=True)
    if folded is None:
        return loop(samples, dims, tensors, call), (0,) * 5
    saved = [
        None if x is None else _front(samples, x, dim).flatten(0, 1)
        for x, dim in zip((dout, out, lse, dlse), (dims[0], *dims[-3:]), strict=True)
    ]
    return unfold(samples, call(saved[0], *folded, *saved[1:])), (0,) * 5


@torch.library.register_vmap("anyattn::forward", lib=ops.library)
def _forward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Results, tuple[int, int]]:
    arrays, options, backend = ops.forward_arguments(arguments)
    dims = (*in_dims, *[None] * len(arrays))[: len(arrays)]
    return forward(info.batch_size, dims, arrays, lambda *xs: ops.forward(*xs, *options, backend))


@torch.library.register_vmap("anyattn::backward", lib=ops.library)
def _backward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Results, tuple[int, ...]]:
    (out, lse, dout, dlse), arrays, options, *rest = ops.backward_arguments(arguments)
    tensors = (dout, *arrays, out, lse, dlse)
    dims = (*in_dims, None)[: len(tensors)]  # the dispatcher may have stripped dlse
    return backward(info.batch_size, dims, tensors, lambda *xs: ops.backward(*xs, *options, *rest))
