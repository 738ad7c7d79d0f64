"""Rules for torch.vmap: samples become one call with a larger batch, or a loop of calls if they cannot be combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...definition.inputs import FIELDS, HEADS, SCALES, SCORES, STATE, Tangents
from ...definition.options import Options
from ...definition.passes import BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT, Pass
from . import ops

Dims = Sequence["int | None"]
Results = tuple[Tensor, ...]
Mapped = dict[str, tuple[Tensor, "int | None"]]  # arrays that were passed, and their sample dimension


def fold(samples: int, given: Mapped, *, gradients: bool = False) -> dict[str, Tensor] | None:
    """Return the arrays of all samples as one call's (batch entry n * batch + b), or None if a loop is needed.

    `gradients`: the results hold one gradient per sample for every array, including arrays that all samples share.
    """
    mapped = {_primal(name) for name, (_, dim) in given.items() if dim is not None}
    if any(_needs_loop(_primal(name), _primal(name) in mapped or gradients) for name in given):
        return None
    paged = bool(given.keys() & {"block_table", "cache_batch_idx"})
    if paged and (gradients or mapped & {"k", "v"}):
        return None
    q = _front(samples, *given["q"])
    folded: dict[str, Tensor] = {}
    for name, (x, dim) in given.items():
        primal = _primal(name)
        if _is_shared(primal) or (paged and primal in ("k", "v")):
            folded[name] = x
        elif primal in FIELDS and FIELDS[primal].kind in (SCORES, HEADS):
            per_sample = gradients and FIELDS[primal].gradient
            score = _fold_score(
                samples, q.shape[1], x, dim, differs=primal in mapped or per_sample, per_sample=per_sample
            )
            if score is None:
                return None
            folded[name] = score
        else:
            folded[name] = _front(samples, x, dim).flatten(0, 1)
    return folded


def _primal(name: str) -> str:
    """Return the array whose shape an array has: a tangent's input, otherwise the array itself."""
    return name[1:] if name in Tangents._fields else name


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


def _fold_score(
    samples: int, batch: int, x: Tensor, dim: int | None, *, differs: bool, per_sample: bool
) -> Tensor | None:
    """Return bias or mask (1 or batch, ...), or slopes (nheads,) or (batch, nheads), for samples * batch entries.

    differs: the array or its tangent differs between samples, and both must have one shape.
    """
    if not differs and (x.ndim == 1 or x.shape[0] == 1):
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


def apply(
    pass_: Pass,
    samples: int,
    dims: Dims,
    arrays: Sequence[Any],
    call: Callable[..., Results],
    *,
    separate: bool = False,
) -> tuple[Results, tuple[int, ...]]:
    """Return (results, their dims) of the pass `call(*arrays)`, in one call or one call per sample.

    A pass that returns gradients returns one gradient per sample of every array. separate: one call per sample, because
    a score function counts the entries of the batch.
    """
    folded = None
    if not separate:
        folded = fold(samples, _given(pass_.inputs, arrays, dims), gradients=pass_ in (BACKWARD, SECOND))
    if folded is None:
        results = loop(samples, dims, arrays, call)
    else:
        results = unfold(samples, call(*[folded.get(name) for name in pass_.inputs]))
    return results, tuple(0 for _ in pass_.outputs)


def _given(names: Sequence[str], arrays: Sequence[Any], dims: Dims) -> Mapped:
    """Return the arrays that are not None."""
    return {name: (x, dim) for name, x, dim in zip(names, arrays, dims, strict=True) if x is not None}


_SCORE = Options._fields.index("score")


def _register(pass_: Pass) -> None:
    """Register the rule of a pass's operator. The dispatcher may have removed trailing arguments and their dims."""
    operator, count = getattr(ops.operators, pass_.name).default, len(pass_.inputs)
    padding = (None,) * count

    @torch.library.register_vmap(f"{ops.NAMESPACE}::{pass_}", lib=ops.library)
    def rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Results, tuple[int, ...]]:
        dims, arrays = ((*given, *padding)[:count] for given in (in_dims[:count], arguments[:count]))
        scalars = arguments[count:]
        separate = scalars[_SCORE : _SCORE + 1] not in ((), ("",))
        return apply(pass_, info.batch_size, dims, arrays, lambda *xs: operator(*xs, *scalars), separate=separate)


for _pass in (FORWARD, BACKWARD, TANGENT, SECOND, FORWARD_TANGENT):
    _register(_pass)
