"""Scores and weights of JAX arrays in differentiable operations of JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...definition.dtypes import DTYPES
from ...definition.inputs import Inputs
from ...definition.options import Options
from .. import scores as formulas
from .arrays import check, describe, is_concrete


def scores(inputs: Inputs, options: Options, queries: Any, stage: formulas.Stage, lse: Any) -> jax.Array:
    """Return a stage of the scores from prepared inputs, computed as one tile."""
    q, arrays = inputs.q, formulas.named(inputs)
    if lse is not None:
        arrays["lse"] = check("lse", lse)
    described = {name: describe(name, x.shape, x.dtype) for name, x in arrays.items()}
    sizes = formulas.check(described, options, described.pop("lse", None))
    arrays |= {"i": jnp.arange(sizes.seqlen_q), "j": jnp.arange(sizes.seqlen_k)}
    kind = DTYPES[q.dtype.name].compute
    functions = formulas.Functions(jnp.exp, jnp.tanh, jnp.where, _listed, lambda x: x.astype(kind))
    chosen, keys = _queries(queries, sizes.seqlen_q), slice(0, sizes.seqlen_k)
    whole: jax.Array = formulas.tile(functions, sizes, arrays, chosen, keys, stage)
    return whole.astype(q.dtype)


def _listed(slots: Any, width: int, nheads: int) -> Any:
    empty = jnp.zeros((*slots.shape[:-1], width + 1), bool)  # the last column collects slots outside the tile
    found = jnp.put_along_axis(empty, slots, True, axis=-1, inplace=False)[..., :-1]
    return found if found.shape[1] == 1 else jnp.repeat(found, nheads // found.shape[1], axis=1)


def _queries(queries: Any, seqlen_q: int) -> Any:
    """Return a slice or an index array. JAX would clamp an index that is out of range, so values must be known."""
    if queries is None:
        return slice(None)
    if isinstance(queries, slice):
        formulas.check_slice(queries)
        return queries
    if not is_concrete(queries):
        raise TypeError("queries must be indices that are known when the function is traced, got a tracer.")
    indices = np.asarray(queries)
    formulas.check_queries(indices.shape, indices.dtype.name, integers=indices.dtype.kind in "iu")
    if indices.size:
        formulas.check_range(int(indices.min()), int(indices.max()), seqlen_q)
    return indices.astype(np.int32)
