"""Types of arrays inside jax.shard_map: the axes of the mesh over which a value varies.

Older versions of JAX have no such types; their arrays pass unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import PartitionSpec


def _axes(array: Any) -> frozenset[Any]:
    """Return the axes over which an array varies."""
    aval = jax.typeof(array) if hasattr(jax, "typeof") else None
    kind = getattr(aval, "manual_axis_type", None)
    found: frozenset[Any] = kind.varying if kind is not None else getattr(aval, "vma", frozenset())
    return found


def alike(arrays: Sequence[Any]) -> list[Any]:
    """Return the arrays, each varying over all axes over which one of them varies."""
    axes = [_axes(x) for x in arrays]
    union = frozenset().union(*axes)
    return [x if own == union else _vary(x, tuple(union - own)) for x, own in zip(arrays, axes, strict=True)]


def _vary(array: Any, axes: tuple[Any, ...]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)


def type_like(aval: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return the type of a result that varies like an operand."""
    kind = getattr(aval, "manual_axis_type", None)
    vma = getattr(aval, "vma", frozenset()) if kind is None else kind.varying
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if not vma and (mesh is None or mesh.empty):
        return ShapedArray(shape, jax.numpy.dtype(dtype))
    whole = aval.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=jax.numpy.dtype(dtype), weak_type=False, sharding=whole)
