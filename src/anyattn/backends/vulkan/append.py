"""Append to a KV cache on the device: new keys are rotated and written after the keys in use."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition.dtypes import widen
from ...definition.problem import Problem
from ..base import Call
from . import tables, tuning
from .arrays import VECTOR, Region
from .device_array import DeviceArray
from .engine import Grid, Job, Launch, current_engine
from .memory import Buffer

ROTARY, INTERLEAVED = 1, 2  # bits of problem.comp


class AppendPlan:
    """Plan of the APPEND pass on arrays of one device."""

    workspace_bytes = 0
    lse_optional = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def warmup(self) -> None:
        """Do nothing, because the only shader is small and is compiled at the first call."""

    def run(self, call: Call) -> None:
        current_engine().run_job(partial(self._append, call))

    def _append(self, call: Call, job: Job) -> None:
        problem = self.problem
        lengths = np.asarray(call.cache_seqlens, np.int32)
        entries = np.arange(problem.batch) if call.cache_batch_idx is None else call.cache_batch_idx
        steps = np.full(problem.batch, problem.seqlen_new)
        cos, sin = (_angles(job, problem, getattr(call, name)) for name in ("rotary_cos", "rotary_sin"))
        rows = (steps, lengths, np.ones_like(lengths), lengths, entries)
        _move(job, problem, call.new_k, call.k, rows, call.block_table, (cos, sin))
        _move(job, problem, call.new_v, call.v, rows, call.block_table, None)
        if call.out is not None:
            moving = np.full(problem.batch, int(problem.rotation.by_row))
            everywhere = np.full(problem.batch, problem.seqlen_q)
            rows = (everywhere, lengths, moving, np.zeros_like(lengths), np.arange(problem.batch))
            _move(job, problem, call.q, call.out, rows, None, (cos, sin))
        job.finish()


def _angles(job: Job, problem: Problem, table: npt.NDArray[Any] | None) -> Buffer | None:
    """Return cos or sin as float32."""
    if table is None or problem.rotary_cos is None:
        return None
    return job.upload_bytes(np.ascontiguousarray(widen(table, table.dtype.name, "float32")).ravel())


def _move(
    job: Job,
    problem: Problem,
    source: DeviceArray,
    target: DeviceArray,
    rows: tuple[npt.NDArray[Any], ...],
    pages: npt.NDArray[np.int32] | None,
    angles: tuple[Buffer | None, Buffer | None] | None,
) -> None:
    """Copy rows of each sequence in source (count, position, whether it moves, first slot, entry) to their slots."""
    for array in (source, target):
        array.check(job)
    count, position, moving, slot, entry = rows
    batch, heads = problem.batch, source.shape[2]
    entry = entry if pages is None else np.zeros_like(entry)
    nothing = np.zeros_like(count)
    sequences = np.stack((count, slot, position, moving, np.arange(batch), nothing, entry, nothing), axis=1)
    rest = [sequences.astype(np.int32).ravel()] + ([] if pages is None else [np.ascontiguousarray(pages).ravel()])
    rotary_dim = problem.rotary_dim if angles and angles[0] is not None else 0
    values = _values(source.region, target.region) | {
        "features": tables.FEATURES["paged"] if pages is not None else 0,
        **{"nheads": heads, "group": 1, "rotary_dim": rotary_dim, "interleaved": int(problem.rotation.interleaved)},
        **{"page_size": max(problem.page_size, 1), "pages_at": tables.SEQUENCE_INTS * batch},
        "max_pages": 0 if pages is None else pages.shape[1],
    }
    table = job.upload_bytes(tables.pack(values, None, np.concatenate(rest)))
    used = -(-source.shape[-1] // VECTOR)
    config = tuning.Config(64, used, used, 1, 1, 4, tables.FEATURES["paged"], problem.q.dtype, False, False)
    pipeline = job.engine.pipeline("append", config)
    job.commands.barrier()
    buffers = (table, table, source.buffer, target.buffer, *(x or table for x in angles or (table, table)))
    slices = [(buffer, 0, buffer.size) for buffer in buffers]
    grid = Grid(-(-int(count.max(initial=0)) * used // config.workgroup), batch * heads, float(source.region.items))
    if grid.blocks:
        job.run(pipeline, Launch((0, heads), (0, batch), True), slices, grid)


def _values(source: Region, target: Region) -> dict[str, float]:
    names = ("head", "batch", "row")  # names in tables.glsl for the source q and the target k
    regions = {"q": source, "k": target}
    return {f"{x}_{name}": regions[x].strides[i] // VECTOR for x in regions for i, name in enumerate(names)}
