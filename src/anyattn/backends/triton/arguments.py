"""Arguments and constants of kernels for a Problem: numbers, and positions of the call's arrays."""

from __future__ import annotations

from typing import Any

from ...definition import philox
from ...definition.dtypes import DTYPES
from ...definition.problem import Array, Problem
from ...definition.quantised import SCALES_OF
from . import score_arguments, tuning
from .device import device
from .launch import Address, f32, i32, i64, stride
from .score_arguments import Lists
from .tuning import Config, chunks
from .views import Dense, Dropout, Heads, Interval, Sizes, Stored, Tables, View

# torch's precision of float32 products -> Triton's name
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def common(problem: Problem, lists: Lists | None = None) -> tuple[Any, ...]:
    """Return bias, mask, heads, tables, sizes, interval, scalars and dropout in the kernels' parameter order."""
    interval = problem.interval
    left, right, chunk = (
        None if bound is None else i64(bound) for bound in (interval.left, interval.right, interval.chunk or None)
    )
    dropout = None
    if problem.dropout_threshold:
        factor = philox.keep_scale(problem.dropout_p)
        dropout = Dropout(Address("rng_state", "int64"), i32(problem.dropout_threshold), f32(factor))
    return (
        dense("bias", problem.bias),
        dense("mask", problem.mask),
        heads(problem),
        tables(problem),
        sizes(problem),
        Interval(left, right, chunk),
        score_arguments.scalars(problem, lists),
        dropout,
    )


def view(name: str, array: Array) -> View:
    batch, row, head, _ = array.strides4()
    return View(Address(name, array.dtype), *(stride(x) for x in (batch, row, head)))


def stored(problem: Problem, name: str) -> Stored:
    """Return k or v, with the scales of quantised ones.

    The pointer has the stored dtype. uint8 means float8_e4m3fn that must be converted by its bits.
    """
    array = problem.arrays[name]
    plain = view(name, array)
    if not problem.quantised:
        return Stored(*plain)
    by_bits = array.dtype == "float8_e4m3fn" and not tuning.has_float8(device(problem.device).arch)
    address = Address(name, "uint8" if by_bits else array.dtype)
    scale = problem.arrays[SCALES_OF[name]]
    *lead, head = scale.strides or (0,)
    batch, row = i64(lead[0] if lead else 0), i64(lead[1]) if len(lead) == 2 else None
    return Stored(address, *plain[1:], Address(SCALES_OF[name], "float32"), batch, row, i64(head))


def statistics(name: str, array: Array) -> View:
    """Return the view of lse, dlse or delta: (batch, nheads, row), or packed (nheads, row)."""
    *batch, head, row = array.strides
    return View(Address(name, "float32"), i64(batch[0] if batch else 0), i64(row), i64(head))


def dense(name: str, array: Array | None) -> Dense | None:
    if array is None:
        return None
    steps = [0 if size == 1 else step for size, step in zip(array.shape, array.strides, strict=True)]
    return Dense(Address(name, array.dtype), *(i64(step) for step in steps))


def heads(problem: Problem) -> Heads:
    slopes, sink = problem.alibi_slopes, problem.sink
    step = slopes.strides[0] if slopes is not None and len(slopes.shape) == 2 else 0
    return Heads(
        None if slopes is None else Address("alibi_slopes", "float32"),
        i64(step),
        None if sink is None else Address("sink", "float32"),
    )


def tables(problem: Problem) -> Tables:
    names = Tables._fields[:-1]
    given = [None if getattr(problem, name) is None else Address(name, "int32") for name in names]
    pages = problem.block_table
    return Tables._make([*given, i64(0 if pages is None else pages.shape[1])])


def sizes(problem: Problem) -> Sizes:
    rows_k = problem.k.shape[0 if problem.packed_k else 1]
    entries = 1 if problem.packed_k else problem.k.shape[0]
    return Sizes(
        *(i32(x) for x in (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.nheads, problem.group)),
        *(i32(x) for x in (problem.q.shape[0] if problem.packed_q else 0, rows_k, entries, problem.page_size)),
    )


def key_bytes(problem: Problem) -> int:
    """Return the bytes of k and v for one KV head of one sequence."""
    return problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * DTYPES[problem.k.dtype].itemsize


def dims(problem: Problem) -> dict[str, int]:
    """Return the head sizes and their chunks."""
    (d0, d1), (e0, e1) = chunks(problem.head_dim), chunks(problem.head_dim_v)
    sizes = {"HEAD_DIM": problem.head_dim, "HEAD_DIM_V": problem.head_dim_v}
    return {**sizes, "D0": d0, "D1": d1, "E0": e0, "E1": e1}


def flags(problem: Problem) -> dict[str, Any]:
    """Return the constants of the mask, the scores and the products.

    HOLES: there may be masked keys between visible ones.
    """
    interval = problem.interval
    return {
        "TOP_LEFT": problem.alignment == "top-left",
        "LOWER": interval.left is not None or interval.chunk > 0 or problem.leftpad_k is not None,
        "HOLES": any(bound is not None and bound < 0 for bound in (interval.left, interval.right)),
        "NEGATIVE": problem.scale < 0,
        "PRECISION": precision(problem),
    }


def precision(problem: Problem) -> str:
    """Return the precision of float32 products: torch.set_float32_matmul_precision's, if the hardware has a choice."""
    if problem.dtype != "float32" or not tuning.has_tf32(device(problem.device).arch):
        return "ieee"
    import torch

    try:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set through torch's newer names, which cannot be mixed with this one
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
