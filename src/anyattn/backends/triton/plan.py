"""Plans: which kernels compute a Problem, in which tiles, and with how much workspace."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...definition.problem import Problem
from ..base import Call, contiguous
from . import sm90, tuning
from .arguments import common, statistics, view
from .decode import combine_splits
from .device import Device, device
from .forward import attention_forward
from .launch import Address, Kernel, Template, i32, i64, run_all, warmup_all
from .tuning import Config, chunks
from .views import Schedule, View

OPTIONAL = frozenset(("dbias", "dsink"))  # results that a call may not want
# torch's precision of float32 products: what Triton calls it
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


class TritonPlan:
    """The kernels of one problem, in the order in which they run."""

    lse_optional = False

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        kernels, needed = self._build()
        self._built = {precision(problem): kernels}
        self.forward_bytes, self.backward_bytes = (needed, 0) if problem.dout is None else (0, needed)
        warmup_all([kernel for kernel in kernels if not kernel.template.names & OPTIONAL], problem.device)

    def warmup(self) -> None:
        warmup_all(self._kernels(), self._problem.device)

    def forward(self, call: Call) -> None:
        run_all(self._kernels(), call, self._problem.device)

    def backward(self, call: Call) -> None:
        wanted = [
            kernel
            for kernel in self._kernels()
            if all(getattr(call, name) is not None for name in kernel.template.names & OPTIONAL)
        ]
        run_all(wanted, call, self._problem.device)

    def _kernels(self) -> list[Kernel]:
        """For the precision of float32 products that is in force."""
        now = precision(self._problem)
        if now not in self._built:
            self._built[now], _ = self._build()
        return self._built[now]

    def _build(self) -> tuple[list[Kernel], int]:
        if self._problem.dout is None:
            return forward_kernels(self._problem)
        from .plan_backward import backward_kernels

        return backward_kernels(self._problem)


class Shape(NamedTuple):
    """How a forward is cut: `pack`: a tile holds the heads of a group; `splits` of the keys."""

    config: Config
    pack: bool
    splits: int


def forward_kernels(problem: Problem) -> tuple[list[Kernel], int]:
    """(kernels, bytes of workspace)."""
    shape = forward_shape(problem, device(problem.device))
    if shape.splits == 1:
        kernel = forward_kernel(problem, shape)
        return [kernel if shape.pack else sm90.instead_of(kernel, problem)], 0
    count = 1
    for size in problem.out_shape[:-1]:
        count *= size
    out_bytes = 4 * shape.splits * count * problem.head_dim_v
    parts = (Address("workspace", "float32"), Address("workspace", "float32", out_bytes))
    return [
        forward_kernel(problem, shape, parts),
        combine_kernel(problem, shape, parts, count),
    ], out_bytes + 4 * shape.splits * count


def forward_shape(problem: Problem, gpu: Device) -> Shape:
    """From sizes alone; batch_invariant: from nothing that other sequences may change."""
    width = max(sum(chunks(problem.head_dim)), sum(chunks(problem.head_dim_v)))
    dense = problem.bias is not None or problem.mask is not None
    heavy = dense or problem.packed_q or problem.dropout_threshold > 0
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
    """(tiles of rows per pair, pairs): a pair is a (sequence, head); packed sequences share one numbering of tiles."""
    heads, packed = (problem.nheads_kv, problem.group) if pack else (problem.nheads, 1)
    if problem.packed_q:
        rows = problem.q.shape[0]
        return (rows * packed // config.tile_q + problem.batch + 2 if rows else 0), heads
    return -(-problem.seqlen_q * packed // config.tile_q), heads * problem.batch


def forward_kernel(problem: Problem, shape: Shape, parts: tuple[Address, Address] | None = None) -> Kernel:
    """`parts`: where splits write (out, lse)."""
    config = shape.config
    tiles, pairs = tiles_and_pairs(problem, config, shape.pack)
    out = view("out", contiguous(problem.out_shape, problem.dtype))
    lse = statistics("lse", contiguous(problem.lse_shape, "float32"))
    steps = (0, 0)
    if parts:
        out, lse = View(parts[0], *out[1:]), View(parts[1], *lse[1:])
        count = problem.lse_shape[0] * lse.batch.value if lse.batch.value else problem.nheads * problem.q.shape[0]
        steps = (count * problem.head_dim_v, count)
    section = tuning.section(pairs, key_bytes(problem), device(problem.device).l2_bytes)
    schedule = Schedule(i32(tiles), i32(section), i32(shape.splits), *(i64(step) for step in steps))
    inputs = [view(name, getattr(problem, name)) for name in ("q", "k", "v")]
    arguments = (*inputs, out, lse, *common(problem), schedule)
    constants = {
        **dims(problem),
        **{"TILE_Q": config.tile_q, "TILE_K": config.tile_k, "PACK": shape.pack, "SPLIT": shape.splits > 1},
        **flags(problem),
        "LAST_FIRST": problem.interval.right is not None,
        "EDGE_STAGES": config.edge_stages,
    }
    return Kernel(attention_forward, Template(arguments, constants), (tiles * pairs, shape.splits), options(config))


def key_bytes(problem: Problem) -> int:
    """Of k and v of one KV head of one sequence."""
    return problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * (4 if problem.dtype == "float32" else 2)


def combine_kernel(problem: Problem, shape: Shape, parts: tuple[Address, Address], count: int) -> Kernel:
    e0, e1 = chunks(problem.head_dim_v)
    seqlen_q = problem.lse_shape[-1]
    arguments = (
        *parts,
        Address("out", problem.dtype),
        Address("lse", "float32"),
        *(i32(x) for x in (count, problem.nheads, max(seqlen_q, 1), shape.splits)),
    )
    constants = {"HEAD_DIM_V": problem.head_dim_v, "E0": e0, "E1": e1, "TILE": tuning.COMBINE_ROWS}
    return Kernel(combine_splits, Template(arguments, constants), (-(-count // tuning.COMBINE_ROWS), 1), {})


def dims(problem: Problem) -> dict[str, int]:
    """Head sizes and their chunks."""
    (d0, d1), (e0, e1) = chunks(problem.head_dim), chunks(problem.head_dim_v)
    sizes = {"HEAD_DIM": problem.head_dim, "HEAD_DIM_V": problem.head_dim_v}
    return {**sizes, "D0": d0, "D1": d1, "E0": e0, "E1": e1}


def flags(problem: Problem) -> dict[str, Any]:
    """Constants of the mask, the scores and the products. HOLES: keys that no row sees may lie between those seen."""
    interval = problem.interval
    return {
        "TOP_LEFT": problem.alignment == "top-left",
        "LOWER": interval.left is not None or interval.chunk > 0 or problem.leftpad_k is not None,
        "HOLES": any(bound is not None and bound < 0 for bound in (interval.left, interval.right)),
        "NEGATIVE": problem.scale < 0,
        "PRECISION": precision(problem),
    }


def precision(problem: Problem) -> str:
    """How float32 is multiplied: as torch.set_float32_matmul_precision says, where the hardware has a choice."""
    if problem.dtype != "float32" or not tuning.has_tf32(device(problem.device).arch):
        return "ieee"
    import torch

    try:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set through torch's newer names, which it does not mix with this one
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
