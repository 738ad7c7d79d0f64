"""Append to a KV cache: in place by the backend in plain eager execution, in torch operations if it is traced.

No operator may mutate the cache, because Inductor misplaces a mutated argument that is a view made inside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...config.settings import current
from ...definition import kvcache
from ...definition.inputs import Appended
from ...definition.kvcache import AppendLimits, check_append
from ...definition.options import Rotation
from ...definition.problem import described
from ...runtime import execute
from . import fastpath, ops, tracing
from .adapter import adapter, to_unit_stride
from .quantised import quantise
from .rotary import rotate

TABLES = ("cache_seqlens", "cache_batch_idx", "block_table")


def append(arrays: Appended, rotation: Rotation, backend: str | None, *, check: Callable[[], None]) -> Tensor:
    """Write new_k (rotated) and new_v into the caches k and v; return the rotated q. Tables are int32."""
    for name in ("k", "v", "k_scale", "v_scale"):  # attention would copy the whole cache at every step
        cache = getattr(arrays, name)
        if cache is not None and cache.ndim and cache.stride(-1) != 1 and cache.shape[-1] != 1:
            label = kvcache.LABELS.get(name, name)
            raise ValueError(f"{label} must be contiguous in its last dimension, got strides {cache.stride()}.")
    if not fastpath.can_skip_operator(arrays):
        return _traced(arrays, rotation)
    prepared = [x if x is None or name in TABLES else to_unit_stride(name, x) for name, x in arrays._asdict().items()]
    q: Tensor = execute.append(adapter, Appended(*prepared), rotation, backend, check=check)
    for cache in (arrays.k, arrays.v, arrays.k_scale, arrays.v_scale):
        if cache is not None and not cache.is_inference():
            torch.autograd.graph.increment_version(cache)
    return q


def _traced(arrays: Appended, rotation: Rotation) -> Tensor:
    given = described(Appended._fields, arrays, adapter.describe)
    kvcache.check_arrays(given)
    if tracing.active():  # the sizes of AppendLimits are constants of a trace
        for name in ("k", "new_k", *(("rotary_cos",) if arrays.rotary_cos is not None else ())):
            tracing.fix_shape(kvcache.LABELS.get(name, name), getattr(arrays, name))
    q: Tensor = arrays.q
    new_k: Tensor = arrays.new_k
    tables = (arrays.cache_seqlens, arrays.cache_batch_idx, arrays.block_table)
    limits = kvcache.append_limits(given, by_row=rotation.by_row)
    lengths, entry, row = _slots_operator(*tables, *limits)
    if arrays.rotary_cos is not None:
        angles = (arrays.rotary_cos, arrays.rotary_sin)
        first = lengths[:, None]
        positions = first + torch.arange(q.shape[1], device=q.device) if rotation.by_row else first
        q = rotate(q, *angles, positions, rotation.interleaved)
        new_positions = first + torch.arange(new_k.shape[1], device=q.device)
        exact = new_k if arrays.k_scale is None else new_k.double()  # the definition rotates before it quantises
        new_k = rotate(exact, *angles, new_positions, rotation.interleaved)
    _put(arrays.k, arrays.k_scale, (entry, row), new_k)
    _put(arrays.v, arrays.v_scale, (entry, row), arrays.new_v)
    return q


def _put(cache: Tensor, scale: Tensor | None, where: tuple[Tensor, Tensor], values: Tensor) -> None:
    """Write values into slots of the cache and, for a quantised one, their scales."""
    if scale is not None:
        values, scales = quantise(values, adapter.describe(cache).dtype)
        scale.index_put_(where, scales)
    cache.index_put_(where, values)


ops.library.define(
    "cache_slots(Tensor cache_seqlens, Tensor? cache_batch_idx, Tensor? block_table, SymInt seqlen_new, SymInt slots, "
    "SymInt entries, SymInt page_size, SymInt positions, SymInt positions_needed) "
    "-> (Tensor lengths, Tensor entry, Tensor row)"
)


def _cache_slots(
    cache_seqlens: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None, *sizes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slots that an append writes: (lengths, entry or page, row), int64. Graphs check values through it."""
    tables = dict(zip(TABLES, (cache_seqlens, cache_batch_idx, block_table), strict=True))
    if cache_seqlens.device.type == "cpu" or current().check:
        check_append(
            AppendLimits(*sizes), {name: None if x is None else adapter.numpy(x) for name, x in tables.items()}
        )
    return _slots(cache_seqlens, cache_batch_idx, block_table, AppendLimits(*sizes))


def _slots(
    cache_seqlens: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None, sizes: AppendLimits
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = cache_seqlens.to(torch.int64, copy=True)
    logical = lengths[:, None] + torch.arange(sizes.seqlen_new, device=lengths.device)  # (batch, seqlen_new)
    logical = logical.clamp(0, max(sizes.slots - 1, 0))  # values on a device were not checked
    if block_table is not None:
        page = block_table.to(torch.int64).gather(1, logical // sizes.page_size)
        return lengths, page.clamp(0, max(sizes.entries - 1, 0)), logical % sizes.page_size
    entry = (
        torch.arange(len(lengths), device=lengths.device)
        if cache_batch_idx is None
        else cache_batch_idx.to(torch.int64)
    )
    return lengths, entry.clamp(0, max(sizes.entries - 1, 0))[:, None].expand_as(logical).contiguous(), logical


@torch.library.register_fake(f"{ops.NAMESPACE}::cache_slots", lib=ops.library)
def _fake_slots(cache_seqlens: Tensor, *arguments: Any) -> Sequence[Tensor]:
    _, _, seqlen_new, *_ = arguments
    batch = cache_seqlens.shape[0]
    sizes = ((batch,), (batch, seqlen_new), (batch, seqlen_new))
    return tuple(cache_seqlens.new_empty(size, dtype=torch.int64) for size in sizes)


for _key in ops.DEVICES:
    ops.library.impl("cache_slots", _cache_slots, _key)

_slots_operator = ops.operators.cache_slots.default
