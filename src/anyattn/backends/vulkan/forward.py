"""Forward pass of one problem. The plan fixes regions and pipelines; each call fills the regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition.dtypes import DTYPES
from ...definition.inputs import TABLES
from ...definition.problem import Array, Problem
from ...definition.sequences import sequences
from ..base import Call
from . import tables, tuning
from .arrays import VECTOR, Region, lse_region, rows_region, score_region, words_region
from .commands import Slice
from .device_array import DeviceArray, device_width
from .device_info import DeviceInfo
from .engine import DevicePlan, Engine, Grid, Job, Launch, launches
from .memory import Buffer
from .score_code import generate

BINDINGS = ("tables", "heads", "q", "k", "v", "out", "lse", "bias", "mask", "", "captured")
SPLIT_BINDINGS = ("tables", "heads", "q", "k", "v", "", "partial_lse", "bias", "mask", "partial", "captured")
COMBINE_BINDINGS = ("tables", "", "", "", "", "out", "lse", "", "", "partial", "partial_lse")
MINUS_INFINITY = 0xFF800000
SCORES = ("bias", "mask")
KV_ARRAYS = ("k", "v", "dk", "dv")  # have one head per KV head
# Operations per score in addition to its products with K and V.
SOFTMAX_OPERATIONS = 16


def problem_regions(problem: Problem, dim: int, dim_v: int) -> dict[str, Region]:
    """Return the regions of q, k, v, out, lse and, if given, bias, mask and captured arrays.

    dim and dim_v count vectors.
    """
    itemsize = DTYPES[problem.dtype].itemsize
    width, width_v = VECTOR * dim, VECTOR * dim_v
    if problem.device != "cpu":
        width, width_v = device_width(problem.head_dim), device_width(problem.head_dim_v)
    regions = {
        "q": rows_region(problem.q.shape, itemsize, width),
        "k": rows_region(problem.k.shape, itemsize, width),
        "v": rows_region(problem.v.shape, itemsize, width_v),
        "out": rows_region(problem.out_shape, itemsize, width_v),
        "lse": lse_region(problem.lse_shape),
    }
    for name in SCORES:
        array: Array | None = getattr(problem, name)
        if array is not None:
            regions[name] = score_region(array.shape, DTYPES[array.dtype].itemsize)
    if problem.score:
        regions["captured"] = words_region(generate(problem.score).count_words(problem.functions))
    return regions


def problem_launches(problem: Problem, regions: Mapping[str, Region], limit: int, splits: int = 1) -> list[Launch]:
    """Return the launches; see `engine.launches`. Packed, paged and reordered sequences are not separate in memory."""
    scales = {"out": splits * 4 // DTYPES[problem.dtype].itemsize, "lse": splits} if splits > 1 else {}
    heads = {name: 1 if name in KV_ARRAYS else problem.group for name in regions}
    whole = problem.packed_q or problem.packed_k or problem.paged or problem.cache_batch_idx is not None
    return launches(regions, heads, (problem.nheads_kv, problem.batch), limit, whole, scales)


@dataclass(frozen=True)
class Setup:
    """Setup of a device for a problem. Without launches, the arrays do not fit into the device's bindings."""

    config: tuning.Config
    regions: dict[str, Region]
    split_keys: int
    splits: int
    launches: list[Launch]

    @classmethod
    def of(cls, info: DeviceInfo, problem: Problem) -> Setup:
        config = tuning.forward_config(info, problem)
        regions = problem_regions(problem, config.dim, config.dim_v)
        split_keys = tuning.split_keys(info, problem, config)
        splits = max(1, -(-problem.seqlen_k // split_keys))
        launches = problem_launches(problem, regions, info.storage_range, splits)
        if splits > 1:
            config = replace(config, features=config.features | tables.SPLIT)
        return cls(config, regions, split_keys, splits, launches)


class ForwardPlan(DevicePlan):
    """Plan of the forward pass on a device."""

    def __init__(self, engine: Engine, info: DeviceInfo, problem: Problem) -> None:
        super().__init__(engine)
        self.problem = problem
        setup = Setup.of(info, problem)
        self.config, self.regions, self.launches = setup.config, setup.regions, setup.launches
        self.split_keys, self.splits = setup.split_keys, setup.splits
        self.values = tables.problem_values(problem, self.regions)
        if self.splits > 1:
            self.values |= self._partial_values()

    @property
    def path(self) -> str:
        return self.config.path

    def shaders(self) -> dict[str, tuning.Config]:
        found = {"forward": self.config}
        return found if self.splits == 1 else found | {"combine": self._combining()}

    def run(self, call: Call) -> None:
        if 0 not in self.problem.lse_shape:
            self.engine.run_job(partial(self._compute, call))

    def _compute(self, call: Call, job: Job) -> None:
        problem = self.problem
        buffers = {name: self._buffer(job, call, name) for name in ("q", "k", "v", *SCORES) if has(call, name)}
        buffers |= upload_tables(job, problem, self.values, call)
        buffers["lse"] = job.buffer(self.regions["lse"].nbytes)
        on_device = isinstance(call.out, DeviceArray)
        buffers["out"] = call.out.buffer if on_device else job.buffer(self.regions["out"].nbytes)
        if problem.packed_q or problem.seqused_q is not None:  # queries outside every sequence
            job.commands.fill(buffers["out"], self.regions["out"].nbytes, 0)
            job.commands.fill(buffers["lse"], self.regions["lse"].nbytes, MINUS_INFINITY)
        job.commands.barrier()
        self._dispatch(job, buffers)
        job.commands.barrier()
        for name, array in (("out", None if on_device else call.out), ("lse", call.lse)):
            if array is not None:
                job.download(name, buffers[name], self.regions[name], call.adapter.numpy(array))
        job.finish()

    def _buffer(self, job: Job, call: Call, name: str) -> Buffer:
        """Return the call's array on the device, uploaded if it is on the host."""
        array = getattr(call, name)
        if isinstance(array, DeviceArray):
            array.check(job)
            return array.buffer
        return job.upload(name, self.regions[name], call.adapter.numpy(array))

    def _partial_values(self) -> tables.Values:
        """Return the distances between the results of two splits, sized for the largest launch."""
        parts = {name: max(self._extent(name, launch) for launch in self.launches) for name in ("out", "lse")}
        self.partial_bytes = {"partial": parts["out"] * 4 * self.splits, "partial_lse": parts["lse"] * 4 * self.splits}
        features = int(self.values["features"]) | tables.SPLIT
        return {"features": features, "partial_split": parts["out"] // VECTOR, "partial_lse_split": parts["lse"]}

    def _extent(self, name: str, launch: Launch) -> int:
        """Return the number of items of out or lse in a launch."""
        region = self.regions[name]
        return launch.part(region, self.problem.group)[1] // region.itemsize

    def _dispatch(self, job: Job, buffers: dict[str, Buffer]) -> None:
        problem, config = self.problem, self.config
        if self.splits > 1:
            buffers |= {name: job.buffer(size) for name, size in self.partial_bytes.items()}
        pipeline = job.engine.pipeline("forward", config)
        blocks = -(-problem.seqlen_q * problem.group // config.tile)
        per_score = 8 * (config.dim + config.dim_v) + SOFTMAX_OPERATIONS
        for launch in self.launches:
            units = launch.heads[1] * launch.batches[1]
            work = float(blocks * config.tile) * problem.seqlen_k * units * per_score
            names = BINDINGS if self.splits == 1 else SPLIT_BINDINGS
            slices = bind(problem, launch, self.regions, buffers, names)
            job.run(pipeline, launch, slices, Grid(blocks, units, work, self.splits, self.split_keys, self.splits))
            if self.splits > 1:
                self._combine(job, launch, buffers, units)

    def _combining(self) -> tuning.Config:
        return replace(self.config, shuffle=False, matrix=None)

    def _combine(self, job: Job, launch: Launch, buffers: Mapping[str, Buffer], units: int) -> None:
        config, problem = self._combining(), self.problem
        pipeline = job.engine.pipeline("combine", config)
        vectors = problem.seqlen_q * problem.group * config.dim_v
        slices = bind(problem, launch, self.regions, buffers, COMBINE_BINDINGS)
        job.commands.barrier()
        work = float(vectors) * units * self.splits * SOFTMAX_OPERATIONS
        job.run(pipeline, launch, slices, Grid(-(-vectors // config.workgroup), units, work, self.splits))
        job.commands.barrier()  # the next launch writes the same partial results


def bind(
    problem: Problem,
    launch: Launch,
    regions: Mapping[str, Region],
    buffers: Mapping[str, Buffer],
    names: tuple[str, ...],
) -> list[Slice]:
    """Return the buffer slice for each binding.

    A binding without an array gets the tables, which no shader then reads.
    """
    slices: list[Slice] = []
    for name in names:
        buffer = buffers.get(name, buffers["tables"])
        offset, size = 0, buffer.size
        if name in buffers and name in regions:
            region = regions[name]
            step = 1 if name in KV_ARRAYS else problem.group
            offset, size = launch.part(region, step)
        slices.append((buffer, offset, max(size, VECTOR)))
    return slices


def has(call: Call, name: str) -> bool:
    return getattr(call, name) is not None


def numpy_view(call: Call, name: str) -> npt.NDArray[Any] | None:
    array = getattr(call, name)
    return None if array is None else call.adapter.numpy(array)


def upload_tables(job: Job, problem: Problem, values: tables.Values, call: Call) -> dict[str, Buffer]:
    """Return the buffers of bindings 0 and 1, and the numbers of score functions."""
    views = {name: numpy_view(call, name) for name in TABLES}
    rest = [tables.sequence_rows(problem, list(sequences(problem, views))).ravel()]
    if views["block_table"] is not None:
        rest.append(views["block_table"].ravel())
    rng_state = numpy_view(call, "rng_state") if problem.dropout_threshold else None
    block = tables.pack(values, rng_state, np.concatenate(rest))
    per_head = tables.head_rows(problem, numpy_view(call, "alibi_slopes"), numpy_view(call, "sink"))
    found = {"tables": job.upload_bytes(block), "heads": job.upload_bytes(per_head.ravel())}
    if problem.score:
        arrays = [numpy_view(call, name) for name in ("captured", "captured_indices")]
        found["captured"] = job.upload_bytes(generate(problem.score).words(*arrays))
    return found
