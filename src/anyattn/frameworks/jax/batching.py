"""Rules for jax.vmap: samples become one call with a larger batch, or a loop of calls if they cannot be combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from ...definition.inputs import FIELDS, GRADIENTS, HEADS, SCALES, SCORES, STATE
from ...definition.options import Options
from ...definition.passes import APPEND, BACKWARD, FORWARD
from .calls import Static
from .primitives import PRIMITIVES, bind_static

Mapped = dict[str, tuple[Any, "int | None"]]  # operands, and their sample dimension
_SHARED_IN_APPENDS = ("rotary_cos", "rotary_sin")


def fold(samples: int, given: Mapped, pass_: str) -> dict[str, Any] | None:
    """Return the arrays of all samples as one call's (batch entry n * batch + b), or None if a loop is needed.

    Gradients are one per sample for every array, including arrays that all samples share.
    """
    mapped = {name for name, (_, dim) in given.items() if dim is not None}
    gradients = pass_ not in (FORWARD.name, APPEND.name)
    if any(_needs_loop(name, name in mapped or gradients) for name in given):
        return None
    if gradients and pass_ != BACKWARD.name and any(name in given for name in GRADIENTS):
        return None
    paged = bool(given.keys() & {"block_table", "cache_batch_idx"})
    in_pages = {"k", "v", *(name for name, one in given.items() if _scale_axes(name, *one) == 3)}
    if paged and (gradients or pass_ == APPEND.name or mapped & in_pages):
        return None
    shared = {name for name, one in given.items() if _scale_axes(name, *one) in (0, 1)}
    if mapped & shared:
        return None
    q = _front(samples, *given["q"])
    folded: dict[str, Any] = {}
    for name, (x, dim) in given.items():
        if name in FIELDS and FIELDS[name].kind in (SCORES, HEADS) and not _is_shared(name):
            score = _fold_score(samples, q.shape[1], x, dim, per_sample=gradients and FIELDS[name].gradient)
            if score is None:
                return None
            folded[name] = score
        elif _is_shared(name) or name in shared or (paged and name in in_pages):
            folded[name] = x
        else:
            folded[name] = _flat(_front(samples, x, dim))
    return folded


def _scale_axes(name: str, x: Any, dim: int | None) -> int | None:
    """Return the number of axes of the scales of one sample; None for other arrays."""
    return x.ndim - (dim is not None) if name in FIELDS and FIELDS[name].kind == SCALES else None


def _is_shared(name: str) -> bool:
    """Return whether an array has no batch axis, so samples in one call cannot differ."""
    if name in _SHARED_IN_APPENDS:
        return True
    return name in FIELDS and FIELDS[name].kind == HEADS and all("batch" not in shape for shape in FIELDS[name].shapes)


def _needs_loop(name: str, differs: bool) -> bool:
    """Return whether an array prevents one call: cumulative lengths, a dropout state, or an array without batch."""
    if name in _SHARED_IN_APPENDS:
        return differs
    if name not in FIELDS:
        return False
    packed = any("batch + 1" in shape for shape in FIELDS[name].shapes)
    return packed or FIELDS[name].kind == STATE or (_is_shared(name) and differs)


def _fold_score(samples: int, batch: int, x: Any, dim: int | None, *, per_sample: bool) -> Any:
    """Return bias or mask (1 or batch, ...), or slopes (nheads,) or (batch, nheads), for samples * batch entries."""
    if dim is None and not per_sample and (x.ndim == 1 or x.shape[0] == 1):
        return x
    x = _front(samples, x, dim)
    if x.ndim == 2:
        return _flat(jnp.broadcast_to(x[:, None], (samples, batch, x.shape[1])))
    if per_sample and x.shape[1] != batch:
        return None  # the gradient of a sample is a sum over its batch
    return _flat(jnp.broadcast_to(x, (samples, batch, *x.shape[2:])))


def _front(samples: int, x: Any, dim: int | None) -> Any:
    """Return the array with the sample dimension first."""
    return jnp.broadcast_to(x, (samples, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)


def _flat(x: Any) -> Any:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _rule(arrays: Sequence[Any], dims: Sequence[Any], *, static: Static) -> tuple[list[Any], list[int]]:
    dims = [dim if isinstance(dim, int) else None for dim in dims]
    samples = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)
    folded = None
    if not (isinstance(static.options, Options) and static.options.score):  # score functions count the batch's entries
        folded = fold(samples, dict(zip(static.names, zip(arrays, dims, strict=True), strict=True)), static.pass_)
    if folded is None:
        found = _loop(arrays, dims, static)
    else:
        results = bind_static(static, [folded[name] for name in static.names])
        found = [x.reshape(samples, x.shape[0] // samples, *x.shape[1:]) for x in results.values()]
    return found, [0] * len(found)


def _loop(arrays: Sequence[Any], dims: Sequence[int | None], static: Static) -> list[Any]:
    """Return the results of one call per sample, stacked along a new first dimension."""
    mapped = [jnp.moveaxis(x, dim, 0) for x, dim in zip(arrays, dims, strict=True) if dim is not None]

    def one(parts: list[Any]) -> list[Any]:
        rest = iter(parts)
        given = [x if dim is None else next(rest) for x, dim in zip(arrays, dims, strict=True)]
        return list(bind_static(static, given).values())

    return list(jax.lax.map(one, mapped))


for _primitive in PRIMITIVES.values():
    batching.primitive_batchers[_primitive] = _rule
