"""Plans of the backward pass: delta, dk and dv by tiles of keys, dq by tiles of queries; dbias and dsink on request."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ...definition.problem import Array, Problem, contiguous
from . import tuning
from .arguments import common, dense, dims, flags, options, sizes, statistics, stored, tables, view
from .backward import attention_backward_delta, attention_backward_dkv, attention_backward_dq
from .dbias import BiasReduction, attention_backward_dbias, attention_backward_dsink, sum_parts
from .device import Device, device
from .launch import Address, Kernel, Template, i32, i64
from .plan_captured import captured_kernels
from .plan_score import list_kernels, plan_lists, total_bytes
from .score_arguments import Lists, Tiles
from .tuning import Config
from .views import Dense, Schedule, Stored, View

BYTES = 4  # size of a float32


def backward_kernels(problem: Problem) -> tuple[list[Kernel], int]:
    """Return (kernels, bytes of workspace)."""
    width = max(sum(tuning.chunks(problem.head_dim)), sum(tuning.chunks(problem.head_dim_v)))
    gpu = device(problem.device)
    dkv, dq = tuning.backward(gpu.arch, problem.dtype, width)
    # For delta; at least one, because an empty workspace has no address.
    used = BYTES * max(math.prod(problem.lse_shape), 1)
    kernels = []
    if not problem.quantised:
        by_key = plan_lists(problem, Tiles(dkv.tile_q, dkv.tile_k, by_key=True), used)
        used = total_bytes(used, by_key)
        kernels += [*list_kernels(problem, by_key), dkv_kernel(problem, dkv, by_key)]
    by_row = plan_lists(problem, Tiles(dq.tile_q, dq.tile_k), used)
    used = total_bytes(used, by_row)
    kernels = [delta_kernel(problem), *kernels, *list_kernels(problem, by_row), dq_kernel(problem, dq, by_row)]
    if problem.bias is not None:
        reduction = plan_bias(problem, problem.bias, tuning.bias(gpu.arch, problem.dtype, width), gpu)
        kernels += bias_kernels(
            problem, problem.bias, reduction, used, Biases(attention_backward_dbias, inputs(problem))
        )
        used += reduction.bytes
    if problem.sink is not None:
        kernels.append(sink_kernel(problem))
    if problem.captured is not None:
        order = row_schedule(problem, dq.tile_q)
        more, used = captured_kernels(problem, inputs(problem), by_row, dq, order, used)
        kernels += more
    return kernels, used


def delta_view(problem: Problem) -> View:
    """Return the view of delta, which has lse's layout and starts the workspace."""
    return statistics("workspace", contiguous(problem.lse_shape, "float32"))


def row_schedule(problem: Problem, tile: int) -> tuple[Schedule, int]:
    """Return (schedule, programs) for tiles of queries."""
    if problem.packed_q:
        rows = problem.q.shape[0]
        return schedule(rows // tile + problem.batch + 2 if rows else 0, problem.nheads)
    return schedule(-(-problem.seqlen_q // tile), problem.nheads * problem.batch)


def key_schedule(problem: Problem, tile: int) -> tuple[Schedule, int]:
    """Return (schedule, programs) for tiles of keys."""
    if problem.packed_k:
        rows = problem.k.shape[0]
        return schedule(rows // tile + problem.batch + 2 if rows else 0, problem.nheads_kv)
    return schedule(-(-problem.seqlen_k // tile), problem.nheads_kv * problem.batch)


def schedule(tiles: int, pairs: int) -> tuple[Schedule, int]:
    return Schedule(i32(tiles), i32(1), i32(1), i64(0), i64(0)), tiles * pairs


def delta_kernel(problem: Problem) -> Kernel:
    assert problem.out is not None and problem.dout is not None
    tile = tuning.DELTA_ROWS
    order, programs = row_schedule(problem, tile)
    dlse = None if problem.dlse is None else statistics("dlse", problem.dlse)
    arguments = (
        view("out", problem.out), view("dout", problem.dout), dlse, delta_view(problem),
        tables(problem), sizes(problem), order,
    )  # fmt: skip
    known = dims(problem)
    constants = {name: known[name] for name in ("HEAD_DIM_V", "E0", "E1")}
    constants |= {"TILE_Q": tile, "TOP_LEFT": flags(problem)["TOP_LEFT"]}
    return Kernel(attention_backward_delta, Template(arguments, constants), (programs, 1), {})


def dkv_kernel(problem: Problem, config: Config, lists: Lists | None = None) -> Kernel:
    order, programs = key_schedule(problem, config.tile_k)
    results = [view(f"d{name}", contiguous(getattr(problem, name).shape, problem.result_dtype)) for name in ("k", "v")]
    arguments = (*inputs(problem), *results, *common(problem, lists), order)
    constants = {**dims(problem), "TILE_Q": config.tile_q, "TILE_K": config.tile_k}
    constants |= {name: flags(problem)[name] for name in ("TOP_LEFT", "LOWER", "PRECISION")}
    return Kernel(attention_backward_dkv, Template(arguments, constants), (programs, 1), options(config))


def dq_kernel(problem: Problem, config: Config, lists: Lists | None = None) -> Kernel:
    order, programs = row_schedule(problem, config.tile_q)
    dq = view("dq", contiguous(problem.q.shape, problem.result_dtype))
    arguments = (*inputs(problem), dq, *common(problem, lists), order)
    constants = {**dims(problem), "TILE_Q": config.tile_q, "TILE_K": config.tile_k}
    constants |= {name: flags(problem)[name] for name in ("TOP_LEFT", "LOWER", "HOLES", "PRECISION")}
    constants["LAST_FIRST"] = problem.interval.right is not None
    return Kernel(attention_backward_dq, Template(arguments, constants), (programs, 1), options(config))


class Biases(NamedTuple):
    """Kernel that computes dbias, and its first arguments."""

    function: Any
    arrays: tuple[Any, ...]


class BiasPlan(NamedTuple):
    """Division of dbias:

    axes of the programs, axes that each program sums over (see dbias.BiasReduction), and parts.
    """

    config: Config
    own: tuple[int, ...]  # batch entries, heads, tiles of queries, tiles of keys
    add: tuple[int, ...]
    parts: int
    elements: int

    @property
    def bytes(self) -> int:
        """Return the bytes of workspace for the parts."""
        return BYTES * self.parts * self.elements if self.parts > 1 else 0


def plan_bias(problem: Problem, bias: Array, config: Config, gpu: Device) -> BiasPlan:
    """Return the division of dbias, from sizes only."""
    tiles = (-(-problem.seqlen_q // config.tile_q), -(-problem.seqlen_k // config.tile_k))
    whole = (problem.batch, problem.nheads, *tiles)
    own = tuple(1 if size == 1 else count for size, count in zip(bias.shape, whole, strict=True))
    add = tuple(count if size == 1 else 1 for size, count in zip(bias.shape, whole, strict=True))
    parts = max(1, min(math.prod(add), 2 * gpu.processors // max(math.prod(own), 1)))
    return BiasPlan(config, own, add, parts, math.prod(bias.shape))


def bias_kernels(problem: Problem, bias: Array, reduction: BiasPlan, used: int, biases: Biases) -> list[Kernel]:
    """Return the kernels of dbias. used: bytes of workspace before the parts."""
    dtype = problem.compute_dtype if problem.partial else bias.dtype
    result, config = Address("dbias", dtype), reduction.config
    parts = Address("workspace", "float32", used)
    steps = dense("dbias", contiguous(bias.shape, dtype))
    assert steps is not None
    target = Dense(parts if reduction.parts > 1 else result, *steps[1:])
    counts = BiasReduction._make(
        [*(i32(x) for x in (*reduction.own[1:], *reduction.add, reduction.parts)), i64(reduction.elements)]
    )
    constants = {**dims(problem), "TILE_Q": config.tile_q, "TILE_K": config.tile_k}
    constants |= {name: flags(problem)[name] for name in ("TOP_LEFT", "LOWER", "HOLES", "PRECISION")}
    constants |= {"ADD_ROWS": bias.shape[2] == 1, "ADD_KEYS": bias.shape[3] == 1}
    template = Template((*biases.arrays, target, *common(problem), counts), constants)
    kernels = [Kernel(biases.function, template, (math.prod(reduction.own), reduction.parts), options(config))]
    if reduction.parts > 1:
        template = Template(
            (parts, result, i32(reduction.parts), i64(reduction.elements)), {"TILE": tuning.SUM_ELEMENTS}
        )
        kernels.append(Kernel(sum_parts, template, (-(-reduction.elements // tuning.SUM_ELEMENTS), 1), {}))
    return kernels


def sink_kernel(problem: Problem) -> Kernel:
    assert problem.lse is not None
    rows = problem.lse_shape[-1]
    count = math.prod(problem.lse_shape) // problem.nheads
    arguments = (
        Address("sink", "float32"), statistics("lse", problem.lse), delta_view(problem), Address("dsink", "float32"),
        i32(max(rows, 1)), i32(count),
    )  # fmt: skip
    template = Template(arguments, {"TILE": tuning.SUM_ELEMENTS})
    return Kernel(attention_backward_dsink, template, (problem.nheads, 1), {})


def inputs(problem: Problem) -> tuple[View | Stored, ...]:
    """Return q, k, v, dout, lse and delta in the parameter order of every kernel except delta's."""
    assert problem.dout is not None and problem.lse is not None
    arrays = (view("q", problem.q), stored(problem, "k"), stored(problem, "v"), view("dout", problem.dout))
    return (*arrays, statistics("lse", problem.lse), delta_view(problem))
