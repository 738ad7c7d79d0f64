"""Division of a call over the devices of a mesh, along batch and heads, as XLA's partitioner asks for it.

Queries, keys and head dimensions stay whole on each device. Gradients of arrays that the devices share are summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...definition.passes import FORWARD
from ...definition.problem import Problem
from .calls import Static, compute, problem, results

BATCH, HEADS, HEADS_KV = "batch", "nheads", "nheads_kv"
Axes = tuple[str, ...]  # of the mesh

_LIKE_Q = ("q", "out", "dout", "dq", "tq", "tout", "ddout")
_LIKE_K = ("k", "v", "dk", "dv", "tk", "tv")
_NEW = ("new_k", "new_v")
_LIKE_LSE = ("lse", "dlse", "tlse", "ddlse")
_SCORES = ("bias", "mask", "dbias", "tbias")
_HEADS = ("alibi_slopes", "sink", "dsink", "tsink")
_SCALES = ("k_scale", "v_scale")
_SEQUENCES = ("seqused_q", "seqused_k", "leftpad_k", "offset", "cache_batch_idx", "cache_seqlens", "block_table")


class Type(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: Any


class Whole(NamedTuple):
    """Call before it is divided."""

    static: Static
    operands: tuple[Type, ...]


class Division(NamedTuple):
    """Mesh axes along which a call is divided."""

    batch: Axes = ()
    heads: Axes = ()

    def along(self, label: str | None) -> Axes:
        return self.batch if label == BATCH else self.heads if label in (HEADS, HEADS_KV) else ()


def labels(call: Problem, name: str, shape: Sequence[int]) -> list[str | None]:
    """Return the label of each axis of an operand or a result; None: the axis stays whole."""
    found: list[str | None] = [None] * len(shape)
    if name in _LIKE_Q or name in _LIKE_K or name in _NEW:
        found[-2] = HEADS if name in _LIKE_Q else HEADS_KV
        shared = (call.paged or call.cache_batch_idx is not None) if name in _LIKE_K else False
        if len(shape) == 4 and not shared:
            found[0] = BATCH
    elif name in _LIKE_LSE or name in _SCORES:
        found[-2 if name in _LIKE_LSE else 1] = HEADS
        if len(shape) > 2:
            found[0] = BATCH
    elif name in _HEADS:
        found[-2:] = [BATCH, HEADS][-len(shape) :]
    elif name in _SEQUENCES:
        found[0] = BATCH
    elif name in _SCALES and shape:
        found[-1] = HEADS_KV
        if len(shape) > 1 and not (len(shape) == 3 and (call.paged or call.cache_batch_idx is not None)):
            found[0] = BATCH
    elif name == "kv_indices":
        if not call.packed_q:
            found[0] = BATCH
        if len(shape) == 4 - call.packed_q:
            found[-3] = HEADS_KV
    pairs = zip(found, shape, strict=True)
    return [label if _is_divisible(call, label) and size != 1 else None for label, size in pairs]


def _is_divisible(call: Problem, label: str | None) -> bool:
    """Return whether a call can be computed in parts along an axis.

    Dropped entries and score functions depend on the place in the whole batch.
    Devices that share a cache would write to it or sum it.
    """
    if call.rng_state is not None or call.score:
        return False
    shared = call.paged or call.cache_batch_idx is not None
    whole = call.packed_q or call.packed_k or (shared and call.pass_ is not FORWARD)
    return label != BATCH or not whole


def enable(primitive: Primitive) -> bool:
    """Make programs with this primitive keep their devices until they are compiled; return whether JAX can.

    JAX has no public function for this. Without it, XLA gathers the arrays and every device computes the whole call.
    """
    try:
        from jax._src.dispatch import prim_requires_devices_during_lowering
    except ImportError:
        return False
    prim_requires_devices_during_lowering.add(primitive)
    return True


def explicit(static: Static, arrays: Sequence[Any]) -> list[NamedSharding] | None:
    """Return the shardings of the results if the types of the arrays name a mesh with explicit axes; None otherwise."""
    types = [jax.typeof(x) for x in arrays] if hasattr(jax, "typeof") else []
    meshes = [x.sharding.mesh for x in types if not x.sharding.mesh.empty and x.sharding.mesh.explicit_axes]
    if not meshes:
        return None
    call = problem(static, arrays)
    division = _divide(meshes[0], call, list(zip(static.names, types, strict=True)))
    return [_sharding(meshes[0], call, division, one.name, one.shape) for one in results(static, arrays)]


def partitioned(static: Static, *arrays: Any) -> Any:
    """Compute the results of a pass, divided over the devices of a mesh if the program has several."""
    return _partitioned(Whole(static, tuple(Type(x.shape, x.dtype) for x in arrays)), *arrays)


def _compute(whole: Whole, *arrays: Any) -> list[Any]:
    return compute(whole.static, *arrays)


def _divide(mesh: Mesh, call: Problem, named: Sequence[tuple[str, Any]]) -> Division:
    """Return the division that the shardings of operands and results ask for, as far as it is even."""
    batch: Axes = ()
    heads: Axes = ()
    for name, x in named:
        spec = _spec(x)
        for label, axes, size in zip(labels(call, name, x.shape), spec, x.shape, strict=True):
            if label == BATCH and not batch and size % _count(mesh, axes) == 0:
                batch = axes
            elif label in (HEADS, HEADS_KV) and not heads and call.nheads_kv % _count(mesh, axes) == 0:
                heads = axes
    return Division(batch, () if set(batch) & set(heads) else heads)


def _spec(x: Any) -> list[Axes]:
    """Return the mesh axes of each axis of an array."""
    given = x.sharding.spec if isinstance(x.sharding, NamedSharding) else ()
    found = [() if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in given]
    return [*found, *[()] * (len(x.shape) - len(found))]


def _count(mesh: Mesh, axes: Axes) -> int:
    count = 1
    for axis in axes:
        count *= mesh.shape[axis]
    return count


def _sharding(mesh: Mesh, call: Problem, division: Division, name: str, shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[division.along(label) or None for label in labels(call, name, shape)]))


def _partition(whole: Whole, mesh: Mesh, operands: Any, wanted: Any) -> Any:
    """Return what each device computes, and the shardings of operands and results."""
    static = whole.static
    call, names = problem(static, operands), [one.name for one in results(static, operands)]
    inputs, outputs = list(zip(static.names, operands, strict=True)), list(zip(names, wanted, strict=True))
    division = _divide(mesh, call, [*inputs, *outputs])
    sums = {name: _summed(call, division, name, x.shape) for name, x in outputs}

    def compute_part(*arrays: Any) -> list[Any]:
        found = compute(static, *arrays)
        return [jax.lax.psum(x, sums[name]) if sums[name] else x for name, x in zip(names, found, strict=True)]

    return (
        mesh,
        compute_part,
        [_sharding(mesh, call, division, name, x.shape) for name, x in outputs],
        tuple(_sharding(mesh, call, division, name, x.shape) for name, x in inputs),
    )


def _summed(call: Problem, division: Division, name: str, shape: Sequence[int]) -> Axes:
    """Return the mesh axes over which a gradient is summed: those that divide the call but not the array."""
    if name not in ("dbias", "dsink"):
        return ()
    given = labels(call, name, shape)
    heads = () if HEADS in given else division.heads
    return heads if BATCH in given else (*division.batch, *heads)


def _infer(whole: Whole, mesh: Mesh, operands: Any, wanted: Any) -> Any:
    """Return the shardings of the results, for the partitioner before Shardy."""
    static = whole.static
    call = problem(static, operands)
    division = _divide(mesh, call, list(zip(static.names, operands, strict=True)))
    return [_sharding(mesh, call, division, one.name, one.shape) for one in results(static, operands)]


def _rule(whole: Whole, mesh: Mesh, *types: Any) -> SdyShardingRule:
    """Return the axes that operands and results share, for the Shardy partitioner."""
    call = problem(whole.static, whole.operands)
    inputs = [(name, x.shape) for name, x in zip(whole.static.names, whole.operands, strict=True)]
    outputs = [(one.name, one.shape) for one in results(whole.static, whole.operands)]
    sizes = {"group": call.group} if call.group > 1 and HEADS in labels(call, "q", call.q.shape) else {}
    return SdyShardingRule(_mappings(call, inputs, "i"), _mappings(call, outputs, "o"), **sizes)


def _mappings(call: Problem, named: Sequence[tuple[str, Sequence[int]]], prefix: str) -> tuple[ArrayMapping, ...]:
    heads = CompoundFactor("kv", "group") if call.group > 1 else "kv"
    factors: Mapping[str | None, Any] = {BATCH: "batch", HEADS: heads, HEADS_KV: "kv"}
    return tuple(
        ArrayMapping(
            *[factors.get(label, f"{prefix}{number}_{axis}") for axis, label in enumerate(labels(call, name, shape))]
        )
        for number, (name, shape) in enumerate(named)
    )


_partitioned = custom_partitioning(_compute, static_argnums=(0,))
_partitioned.def_partition(_partition, infer_sharding_from_operands=_infer, sharding_rule=_rule)
