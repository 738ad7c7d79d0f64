"""Backward pass of one problem: delta of every query, then dK/dV, dQ and the bias's gradient, each by its own shader.

All sums are float32 buffers that start at zero. Each workgroup adds to its own entries in a fixed order. If a driver
limits the loops of a shader, several dispatches add to the sums one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ...definition.problem import Problem
from ..base import Call
from . import tables, tuning
from .arrays import ALIGNMENT, VECTOR, Region, lse_region, rows_region, score_region
from .device_info import MATRICES, DeviceInfo
from .engine import DevicePlan, Engine, Grid, Job, Launch
from .forward import SCORES, bind, numpy_view, problem_launches, problem_regions, upload_tables
from .memory import Buffer

FLOAT = 4  # bytes
STEP = ALIGNMENT // FLOAT
UPLOADED = ("q", "k", "v", *SCORES, "out", "lse", "dout", "dlse")
DELTA_BINDINGS = ("tables", "heads", "out", "", "", "dout", "lse", "", "", "dlse", "stats", "sink_terms")
BINDINGS = ("tables", "heads", "q", "k", "v", "dout", "stats", "bias", "mask", "captured")
WHOLE = Launch((0, 1), (0, 1))  # for shaders that treat an array as one row of numbers
# Operations per score in addition to the products.
SCORE_OPERATIONS = 24


def backward_regions(problem: Problem, configs: Mapping[str, tuning.Config]) -> dict[str, Region]:
    """Return the regions of all bound arrays. Sums are float32, with the strides of their own type."""
    dim, dim_v = configs["dq"].dim, configs["dq"].dim_v
    regions = problem_regions(problem, dim, dim_v)
    lse = lse_region(problem.lse_shape)
    regions |= {"dout": regions["out"], "stats": replace(lse, itemsize=2 * FLOAT), "sink_terms": lse}
    if problem.dlse is not None:
        regions["dlse"] = lse
    for name, array, width in (("dq", problem.q, dim), ("dk", problem.k, dim), ("dv", problem.v, dim_v)):
        regions[name] = replace(rows_region(array.shape, 2, VECTOR * width), itemsize=FLOAT)
    if problem.bias is not None:
        row_terms, key_terms = bias_terms(problem, configs["dbias"])
        regions["dbias"] = dbias_region(problem.bias.shape, row_terms * key_terms)
    return regions


def bias_terms(problem: Problem, config: tuning.Config) -> tuple[int, int]:
    """Return the number of terms of an item of dbias that dbias.comp writes next to each other, along rows and keys."""
    assert problem.bias is not None
    row_tiles, key_tiles = tuning.bias_tiles(problem, config)
    return row_tiles if problem.bias.shape[2] == 1 else 1, key_tiles if problem.bias.shape[3] == 1 else 1


def dbias_region(shape: tuple[int, ...], terms: int) -> Region:
    """Return the region of the bias's gradient with this many terms instead of each item."""
    one = score_region(shape, 2)
    head, batch, row, key = (stride * terms for stride in one.strides)
    return Region(one.shape, (head, batch, row, key), FLOAT, terms - 1)


@dataclass(frozen=True, slots=True)
class Pass:
    """Shader that adds to sums.

    It has outputs, the workgroups of a launch, and the keys, rows or turns of each dispatch.
    """

    shader: str
    outputs: tuple[str, ...]
    blocks: int
    units: int
    total: int
    operations: float


class BackwardPlan(DevicePlan):
    """Plan of the backward pass on a device."""

    def __init__(self, engine: Engine, info: DeviceInfo, problem: Problem) -> None:
        super().__init__(engine)
        self.problem = problem
        self.configs = tuning.backward_configs(info, problem)
        self.part_sizes = tuning.part_sizes(info, self.configs)
        self.regions = backward_regions(problem, self.configs)
        self.launches = problem_launches(problem, self.regions, info.storage_range)
        self.values = tables.problem_values(problem, self.regions)
        if problem.bias is not None:
            row_tiles, key_tiles = tuning.bias_tiles(problem, self.configs["dbias"])
            row_terms, key_terms = bias_terms(problem, self.configs["dbias"])
            self.terms = row_terms * key_terms
            one_row, one_key = (size == 1 for size in problem.bias.shape[2:])
            self.values |= {"row_tiles": row_tiles, "key_tiles": key_tiles}
            self.values |= {"row_tile": key_terms if one_row else 0, "key_tile": int(one_key)}

    @property
    def path(self) -> str:
        paths = {self.configs[name].path for name in ("dq", "dkdv")}
        return MATRICES if MATRICES in paths else paths.pop()

    def shaders(self) -> dict[str, tuning.Config]:
        unused = () if self.problem.bias is not None else ("dbias",)
        return {name: config for name, config in self.configs.items() if name not in unused}

    def run(self, call: Call) -> None:
        if 0 in self.problem.lse_shape:
            self._nothing(call)
        else:
            self.engine.run_job(partial(self._compute, call))

    def _compute(self, call: Call, job: Job) -> None:
        buffers = self._upload(job, call)
        wanted = [name for name in ("dq", "dk", "dv", "dbias") if getattr(call, name) is not None]
        sums = [*wanted, "sink_terms"]
        buffers["stats"] = job.buffer(self.regions["stats"].nbytes)
        for name in sums:
            buffers[name] = job.buffer(self.regions[name].nbytes)
            job.commands.fill(buffers[name], self.regions[name].nbytes, 0)
        job.commands.barrier()
        for launch in self.launches:
            self._delta(job, launch, buffers)
        job.commands.barrier()
        for launch in self.launches:
            for one in self._passes(launch, call):
                self._run(job, launch, buffers, one)
        job.commands.barrier()
        for name in wanted:
            self._finish(job, name, buffers[name], call)
        if call.dsink is not None:
            self._finish_sink(job, buffers["sink_terms"], call)
        job.finish()
        if call.dcaptured is not None:  # the functions read no array that has a gradient
            numpy_view(call, "dcaptured")[...] = 0  # type: ignore[index]

    def _nothing(self, call: Call) -> None:
        """Return zero gradients, because there are no queries."""
        for name in ("dq", "dk", "dv", "dbias", "dsink", "dcaptured"):
            array = numpy_view(call, name)
            if array is not None:
                array[...] = 0

    def _upload(self, job: Job, call: Call) -> dict[str, Buffer]:
        views = {name: numpy_view(call, name) for name in UPLOADED}
        buffers = {name: job.upload(name, self.regions[name], x) for name, x in views.items() if x is not None}
        return buffers | upload_tables(job, self.problem, self.values, call)

    def _pipeline(self, shader: str) -> int:
        return self.engine.pipeline(shader, self.configs[shader])

    def _delta(self, job: Job, launch: Launch, buffers: Mapping[str, Buffer]) -> None:
        problem, config = self.problem, self.configs["delta"]
        units, rows = launch.heads[1] * launch.batches[1], problem.seqlen_q * problem.group
        slices = bind(problem, launch, self.regions, buffers, DELTA_BINDINGS)
        grid = Grid(-(-rows // config.workgroup), units, float(rows) * units * (8 * config.dim_v + SCORE_OPERATIONS))
        job.run(self._pipeline("delta"), launch, slices, grid)

    def _passes(self, launch: Launch, call: Call) -> Iterator[Pass]:
        problem, rows = self.problem, self.problem.seqlen_q * self.problem.group
        units = launch.heads[1] * launch.batches[1]
        dq, dkdv = self.configs["dq"], self.configs["dkdv"]
        work = float(rows) * problem.seqlen_k * units
        per_score = (8 * (2 * dq.dim + dq.dim_v) + SCORE_OPERATIONS, 16 * (dq.dim + dq.dim_v) + SCORE_OPERATIONS)
        yield Pass("dq", ("dq",), -(-rows // dq.tile), units, problem.seqlen_k, work * per_score[0])
        blocks = -(-problem.seqlen_k // tuning.owned_keys(dkdv))
        yield Pass("dkdv", ("dk", "dv"), blocks, units, rows, work * per_score[1])
        if call.dbias is not None:
            yield self._bias_pass(launch, work)

    def _bias_pass(self, launch: Launch, work: float) -> Pass:
        problem, config = self.problem, self.configs["dbias"]
        assert problem.bias is not None
        batch, nheads, rows, keys = problem.bias.shape
        heads = launch.heads[1] * problem.group
        row_tiles, key_tiles = tuning.bias_tiles(problem, config)
        units = (1 if nheads == 1 else heads) * (1 if batch == 1 else launch.batches[1])
        turns = heads * launch.batches[1] // units
        turns *= -(-problem.seqlen_q // (config.rows * row_tiles)) if rows == 1 else 1
        turns *= -(-problem.seqlen_k // (config.keys * key_tiles)) if keys == 1 else 1
        blocks = -(-row_tiles * key_tiles // config.workgroup)
        operations = work * (8 * (config.dim + config.dim_v) + SCORE_OPERATIONS)
        return Pass("dbias", ("dbias",), blocks, units, turns, operations)

    def _run(self, job: Job, launch: Launch, buffers: Mapping[str, Buffer], one: Pass) -> None:
        """Run the parts of a pass, one after the other."""
        if not one.blocks * one.units * one.total:
            return
        slices = bind(self.problem, launch, self.regions, buffers, BINDINGS + one.outputs)
        size = self.part_sizes[one.shader]
        parts = -(-one.total // size)
        for part in range(parts):
            if part or one.shader == "dbias":  # launches may share a bias
                job.commands.barrier()
            grid = Grid(one.blocks, one.units, one.operations / parts, one.total, size, 1, part)
            job.run(self._pipeline(one.shader), launch, slices, grid)

    def _finish(self, job: Job, name: str, sums: Buffer, call: Call) -> None:
        """Convert float32 sums to the call's array."""
        array, region = call.adapter.numpy(getattr(call, name)), self.regions[name]
        if name == "dbias":
            region, sums = self._add_terms(job, dbias_region(array.shape, 1), sums, self.terms)
        if array.itemsize != FLOAT:
            region, sums = self._round(job, region, sums)
        job.download(name, sums, region, array)

    def _finish_sink(self, job: Job, terms: Buffer, call: Call) -> None:
        nheads = self.problem.nheads
        region = Region((1, 1, 1, nheads), (0, 0, 0, 1), FLOAT)
        region, sums = self._add_terms(job, region, terms, self.regions["sink_terms"].strides[0])
        job.download("dsink", sums, region, call.adapter.numpy(call.dsink))

    def _add_terms(self, job: Job, region: Region, terms: Buffer, count: int) -> tuple[Region, Buffer]:
        """Return the region of sums of `count` neighbouring terms each."""
        if count == 1:
            return region, terms
        sums, items = job.buffer(region.nbytes), region.used
        job.commands.fill(sums, region.nbytes, 0)
        job.commands.barrier()
        size = self.part_sizes["sum"]
        step = self._step(count * FLOAT)
        for first in range(0, items, step):
            blocks, aligned = min(step, items - first), first - first % STEP
            parts_of = (terms, first * count * FLOAT, blocks * count * FLOAT)
            whole = (sums, aligned * FLOAT, (first - aligned + blocks) * FLOAT)
            for part in range(-(-count // size)):
                grid = Grid(blocks, 1, float(blocks) * count, count, size, 1, part)
                launch = Launch((first - aligned, 1), (0, 1))
                job.run(self._pipeline("sum"), launch, (*[parts_of] * 11, whole), grid)
                job.commands.barrier()
        return region, sums

    def _step(self, nbytes: int) -> int:
        """Return how many items of `nbytes` fit in one binding, rounded down so that the next offset is aligned."""
        step = max(self.engine.device.info.storage_range // nbytes, 1)
        return step - step % STEP if step > STEP else step

    def _round(self, job: Job, region: Region, sums: Buffer) -> tuple[Region, Buffer]:
        """Return the values in 16 bits."""
        rounded = replace(region, itemsize=2)
        target = job.buffer(rounded.nbytes)
        vectors, step = region.items // VECTOR, self._step(VECTOR * FLOAT)
        for first in range(0, vectors, step):
            count = min(step, vectors - first)
            blocks = -(-count // self.configs["store"].workgroup)
            source = (sums, first * VECTOR * FLOAT, count * VECTOR * FLOAT)
            to = (target, first * VECTOR * 2, count * VECTOR * 2)
            grid = Grid(blocks, 1, float(count) * VECTOR, count)
            job.run(self._pipeline("store"), WHOLE, (*[source] * 11, to), grid)
        job.commands.barrier()
        return rounded, target
