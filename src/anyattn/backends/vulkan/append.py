"""Appends to a KV cache that lives on the device: new keys are rotated and written behind those in use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition.dtypes import widen
from ...definition.kvcache import Append
from ..base import Call
from . import tables, tuning
from .arrays import VECTOR, Region
from .device_array import DeviceArray
from .engine import Engine, Grid, Job, Launch
from .memory import Buffer

ROTARY, INTERLEAVED = 1, 2  # bits of append.comp


def append_on_device(engine: Engine, append: Append, call: Call) -> None:
    """Writes call.new_k (rotated) and call.new_v into call.k and call.v, and call.q, rotated, into call.out."""
    lengths = np.asarray(call.cache_seqlens, np.int32)
    entries = np.arange(append.batch) if call.cache_batch_idx is None else call.cache_batch_idx
    steps = np.full(append.batch, append.seqlen_new)
    with Job(engine) as job:
        cos, sin = (_angles(job, append, getattr(call, name)) for name in ("rotary_cos", "rotary_sin"))
        rows = (steps, lengths, np.ones_like(lengths), lengths, entries)
        _move(job, append, call.new_k, call.k, rows, call.block_table, (cos, sin))
        _move(job, append, call.new_v, call.v, rows, call.block_table, None)
        if call.out is not None:
            moving = np.full(append.batch, int(append.by_row))
            everywhere = np.full(append.batch, append.q.shape[1])
            rows = (everywhere, lengths, moving, np.zeros_like(lengths), np.arange(append.batch))
            _move(job, append, call.q, call.out, rows, None, (cos, sin))
        job.finish()


def _angles(job: Job, append: Append, table: npt.NDArray[Any] | None) -> Buffer | None:
    """cos or sin as float32."""
    if table is None or append.rotary_cos is None:
        return None
    return job.upload_bytes(np.ascontiguousarray(widen(table, table.dtype.name, "float32")).ravel())


def _move(
    job: Job,
    append: Append,
    source: DeviceArray,
    target: DeviceArray,
    rows: tuple[npt.NDArray[Any], ...],
    pages: npt.NDArray[np.int32] | None,
    angles: tuple[Buffer | None, Buffer | None] | None,
) -> None:
    """Rows (count, position, whether it moves, first slot, entry) of source, of each sequence, to their slots."""
    for array in (source, target):
        array.check(job)
    count, position, moving, slot, entry = rows
    batch, heads = append.batch, source.shape[2]
    entry = entry if pages is None else np.zeros_like(entry)
    nothing = np.zeros_like(count)
    sequences = np.stack((count, slot, position, moving, np.arange(batch), nothing, entry, nothing), axis=1)
    rest = [sequences.astype(np.int32).ravel()] + ([] if pages is None else [np.ascontiguousarray(pages).ravel()])
    rotary_dim = append.rotary_dim if angles and angles[0] is not None else 0
    values = _values(source.region, target.region) | {
        "features": tables.FEATURES["paged"] if pages is not None else 0,
        **{"nheads": heads, "group": 1, "rotary_dim": rotary_dim, "interleaved": int(append.interleaved)},
        **{"page_size": max(append.page_size, 1), "pages_at": tables.SEQUENCE_INTS * batch},
        "max_pages": 0 if pages is None else pages.shape[1],
    }
    table = job.upload_bytes(tables.pack(values, None, np.concatenate(rest)))
    used = -(-source.shape[-1] // VECTOR)
    config = tuning.Config(64, used, used, 1, 1, 4, tables.FEATURES["paged"], append.q.dtype, False, False)
    pipeline = job.engine.pipeline("append", config)
    job.commands.barrier()
    buffers = (table, table, source.buffer, target.buffer, *(x or table for x in angles or (table, table)))
    slices = [(buffer, 0, buffer.size) for buffer in buffers]
    grid = Grid(-(-int(count.max(initial=0)) * used // config.workgroup), batch * heads, float(source.region.items))
    if grid.blocks:
        job.run(pipeline, Launch((0, heads), (0, batch), True), slices, grid)


def _values(source: Region, target: Region) -> dict[str, float]:
    names = ("head", "batch", "row")  # as tables.glsl calls them, of the source q and of the target k
    regions = {"q": source, "k": target}
    return {f"{x}_{name}": regions[x].strides[i] // VECTOR for x in regions for i, name in enumerate(names)}
