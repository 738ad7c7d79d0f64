"""Plans of the forward pass: tiles of queries, and splits of the keys if the queries alone do not fill the GPU."""

from __future__ import annotations

from typing import NamedTuple

from ...definition.problem import Problem, contiguous
from . import sm90, tuning
from .arguments import common, dims, flags, key_bytes, options, statistics, stored, view
from .decode import combine_splits
from .device import Device, device
from .forward import attention_forward
from .launch import Address, Kernel, Template, i32, i64
from .plan_score import list_kernels, plan_lists, total_bytes
from .score_arguments import Lists, Tiles
from .tuning import Config, chunks
from .views import Schedule, View


class Shape(NamedTuple):
    """Launch shape of a forward kernel.

    pack: a tile holds all query heads of a KV group; splits: number of key splits.
    """

    config: Config
    pack: bool
    splits: int


def forward_kernels(problem: Problem) -> tuple[list[Kernel], int]:
    """Return (kernels, bytes of workspace)."""
    shape = forward_shape(problem, device(problem.device))
    if shape.splits == 1:
        lists = mask_lists(problem, shape, 0)
        kernel = forward_kernel(problem, shape, lists=lists)
        kernel = kernel if shape.pack else sm90.replace_portable(kernel, problem)
        return [*list_kernels(problem, lists), kernel], total_bytes(0, lists)
    count = 1
    for size in problem.out_shape[:-1]:
        count *= size
    out_bytes = 4 * shape.splits * count * problem.head_dim_v
    parts = (Address("workspace", "float32"), Address("workspace", "float32", out_bytes))
    used = out_bytes + 4 * shape.splits * count
    lists = mask_lists(problem, shape, used)
    return [
        *list_kernels(problem, lists),
        forward_kernel(problem, shape, parts, lists),
        combine_kernel(problem, shape, parts, count),
    ], total_bytes(used, lists)


def mask_lists(problem: Problem, shape: Shape, used: int) -> Lists | None:
    """Return the lists of tiles that mask_mod does not exclude. used: bytes of workspace before them."""
    return plan_lists(problem, Tiles(shape.config.tile_q, shape.config.tile_k, shape.pack), used)


def forward_shape(problem: Problem, gpu: Device) -> Shape:
    """Return the launch shape, from sizes only. For batch_invariant, other sequences do not affect it."""
    width = max(sum(chunks(problem.head_dim)), sum(chunks(problem.head_dim_v)))
    dense = problem.bias is not None or problem.mask is not None
    changed = problem.quantised or problem.score != ""
    heavy = dense or changed or problem.packed_q or problem.dropout_threshold > 0
    config = tuning.forward(gpu.arch, problem.dtype, width, heavy=heavy)
    if problem.batch_invariant:
        return Shape(config, False, 1)
    pack = problem.group > 1 and tuning.fill(problem.seqlen_q, config.tile_q) < 0.9 * tuning.fill(
        problem.seqlen_q * problem.group, config.tile_q
    )
    rows = problem.seqlen_q * (problem.group if pack else 1)
    if rows <= tuning.DECODE_ROWS:
        config = tuning.decode(gpu.arch, problem.dtype, width, rows)
    tiles, pairs = tiles_and_pairs(problem, config, pack)
    return Shape(config, pack, tuning.splits(tiles * pairs, -(-problem.seqlen_k // config.tile_k), gpu.processors))


def tiles_and_pairs(problem: Problem, config: Config, pack: bool) -> tuple[int, int]:
    """Return (tiles of queries per pair, pairs).

    A pair is (sequence, head). Packed sequences share one numbering of tiles.
    """
    heads, packed = (problem.nheads_kv, problem.group) if pack else (problem.nheads, 1)
    if problem.packed_q:
        rows = problem.q.shape[0]
        return (rows * packed // config.tile_q + problem.batch + 2 if rows else 0), heads
    return -(-problem.seqlen_q * packed // config.tile_q), heads * problem.batch


def forward_kernel(
    problem: Problem, shape: Shape, parts: tuple[Address, Address] | None = None, lists: Lists | None = None
) -> Kernel:
    """Return the kernel. parts: addresses at which splits write out and lse."""
    config = shape.config
    tiles, pairs = tiles_and_pairs(problem, config, shape.pack)
    out = view("out", contiguous(problem.out_shape, problem.result_dtype))
    lse = statistics("lse", contiguous(problem.lse_shape, "float32"))
    steps = (0, 0)
    if parts:
        out, lse = View(parts[0], *out[1:]), View(parts[1], *lse[1:])
        count = problem.lse_shape[0] * lse.batch.value if lse.batch.value else problem.nheads * problem.q.shape[0]
        steps = (count * problem.head_dim_v, count)
    section = tuning.section(pairs, key_bytes(problem), device(problem.device).l2_bytes)
    schedule = Schedule(i32(tiles), i32(section), i32(shape.splits), *(i64(step) for step in steps))
    inputs = (view("q", problem.q), stored(problem, "k"), stored(problem, "v"))
    arguments = (*inputs, out, lse, *common(problem, lists), schedule)
    constants = {
        **dims(problem),
        **{"TILE_Q": config.tile_q, "TILE_K": config.tile_k, "PACK": shape.pack, "SPLIT": shape.splits > 1},
        **flags(problem),
        "LAST_FIRST": problem.interval.right is not None,
        "EDGE_STAGES": config.edge_stages,
    }
    return Kernel(attention_forward, Template(arguments, constants), (tiles * pairs, shape.splits), options(config))


def combine_kernel(problem: Problem, shape: Shape, parts: tuple[Address, Address], count: int) -> Kernel:
    e0, e1 = chunks(problem.head_dim_v)
    seqlen_q = problem.lse_shape[-1]
    arguments = (
        *parts,
        Address("out", problem.result_dtype),
        Address("lse", "float32"),
        *(i32(x) for x in (count, problem.nheads, max(seqlen_q, 1), shape.splits)),
    )
    constants = {"HEAD_DIM_V": problem.head_dim_v, "E0": e0, "E1": e1, "TILE": tuning.COMBINE_ROWS}
    return Kernel(combine_splits, Template(arguments, constants), (-(-count // tuning.COMBINE_ROWS), 1), {})
