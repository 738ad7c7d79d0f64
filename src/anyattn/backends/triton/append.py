"""Append to a KV cache: write new keys (rotated) and values after the keys in the cache, and rotate q."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...definition.problem import Array, Problem
from ...definition.quantised import SCALES_OF
from .arguments import view
from .launch import Address, Kernel, Template, i32, i64
from .stored import quantise
from .tiles import clamp, narrow
from .views import View


class Rotation(NamedTuple):
    """Tables of angles (positions, half); cos and sin are None if nothing is rotated."""

    cos: Any
    sin: Any
    cos_step: Any
    sin_step: Any
    positions: Any


class Cache(NamedTuple):
    """Position of slots: the number of keys in the cache, and the tables."""

    lengths: Any
    entries: Any
    block_table: Any
    max_pages: Any
    slots: Any
    entries_k: Any
    page_size: Any


@triton.jit
def copy_rows(
    source, target, scale, rotation, cache, rows, nheads,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BY_ROW: tl.constexpr,
    APPEND: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Copy a row of `source` (batch, rows, nheads, DIM), rotated, to that row of `target` or, with APPEND, its slot.

    With scales the row is rotated in float64, which rounds the same way everywhere, and quantised.
    """
    WIDE: tl.constexpr = tl.float32 if scale is None else tl.float64
    program = tl.program_id(0)
    b, t = program // rows, program % rows
    length = tl.load(cache.lengths + b)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, WIDTH)
    inside = (h < nheads)[:, None] & (d < DIM)[None, :]
    heads = b.to(tl.int64) * source.batch + t.to(tl.int64) * source.row + h.to(tl.int64) * source.head
    x = tl.load(source.pointer + heads[:, None] + d[None, :], mask=inside, other=0.0)
    if HALF > 0:
        first = d % 2 == 0 if INTERLEAVED else d < HALF
        partner = tl.where(first, d + 1, d - 1) if INTERLEAVED else tl.where(first, d + HALF, d - HALF)
        turned = d < 2 * HALF
        y = tl.load(source.pointer + heads[:, None] + partner[None, :], mask=inside & turned[None, :], other=0.0)
        angle = d // 2 if INTERLEAVED else d % HALF
        position = clamp(length + t if BY_ROW else length, 0, rotation.positions - 1).to(tl.int64)
        cos = tl.load(rotation.cos + position * rotation.cos_step + angle, mask=turned, other=1.0)
        sin = tl.load(rotation.sin + position * rotation.sin_step + angle, mask=turned, other=0.0)
        cos, sin = cos.to(tl.float32).to(WIDE), sin.to(tl.float32).to(WIDE)
        sin = tl.where(first, -sin, sin)
        own, other = x.to(tl.float32).to(WIDE), y.to(tl.float32).to(WIDE)
        rotated = (own * cos[None, :] + other * sin[None, :]).to(tl.float32)
        if scale is None:
            x = tl.where(turned[None, :], narrow(rotated, target.pointer.dtype.element_ty), x)
        else:
            x = tl.where(turned[None, :], rotated, x.to(tl.float32))
    place, row = b.to(tl.int64), t.to(tl.int64)
    if APPEND:
        slot = length + t
        fits = (slot >= 0) & (slot < cache.slots)  # values on a device were not checked
        nheads = tl.where(fits, nheads, 0)
        inside = inside & (h < nheads)[:, None]
        row = slot.to(tl.int64)
        if cache.block_table is not None:
            page = clamp(slot, 0, cache.slots - 1) // cache.page_size
            place = tl.load(cache.block_table + b.to(tl.int64) * cache.max_pages + page).to(tl.int64)
            row = row % cache.page_size
        if cache.entries is not None:
            place = tl.load(cache.entries + b).to(tl.int64)
        place = clamp(place, 0, cache.entries_k - 1)
    heads = place * target.batch + row * target.row + h.to(tl.int64) * target.head
    pointers = target.pointer + heads[:, None] + d[None, :]
    if scale is not None:
        codes, factors = quantise(x.to(tl.float32), target.pointer.dtype.element_ty)
        tl.store(pointers.to(tl.pointer_type(tl.uint8), bitcast=True), codes, mask=inside)
        heads = place * scale.batch + row * scale.row + h.to(tl.int64) * scale.head
        tl.store(scale.pointer + heads, factors, mask=h < nheads)
    else:
        tl.store(pointers, x, mask=inside)


HEADS = 4  # heads of one program


def append_kernels(problem: Problem) -> list[Kernel]:
    """Return the kernels that copy new keys and values to the cache and, with rotary tables, rotate q into `out`."""
    found = [_kernel(problem, "new_k", "k", rotated=True), _kernel(problem, "new_v", "v", rotated=False)]
    if problem.rotary_dim:
        found.append(_kernel(problem, "q", "out", rotated=True))
    return found


def _kernel(problem: Problem, source: str, target: str, *, rotated: bool) -> Kernel:
    arrays = {**problem.arrays, **problem.outputs()}
    batch, rows, nheads, dim = arrays[source].shape
    half = problem.rotary_dim // 2 if rotated else 0
    scaled = problem.quantised and target != "out"
    arguments = (
        view(source, arrays[source]),
        _target(target, arrays[target]),
        _scale(SCALES_OF[target], problem) if scaled else None,
        _rotation(problem, half),
        _cache(problem),
        i32(rows),
        i32(nheads),
    )
    constants = {
        "DIM": dim,
        "WIDTH": 1 << max(0, dim - 1).bit_length(),
        "HALF": half,
        "INTERLEAVED": problem.rotation.interleaved,
        "BY_ROW": target != "out" or problem.rotation.by_row,
        "APPEND": target != "out",
        "HEADS": HEADS,
    }
    # A fused multiply-add in the rotation would give other bits.
    options = {"enable_fp_fusion": False} if scaled else {}
    return Kernel(copy_rows, Template(arguments, constants), (batch * rows, -(-nheads // HEADS)), options)


def _target(name: str, array: Array) -> View:
    """Return the array that is written. float8_e4m3fn is written as its bits: not every GPU's Triton has its dtype."""
    address = Address(name, "uint8" if array.dtype == "float8_e4m3fn" else array.dtype)
    return View(address, *view(name, array)[1:])


def _scale(name: str, problem: Problem) -> View:
    return View(Address(name, "float32"), *(i64(step) for step in problem.arrays[name].strides))


def _rotation(problem: Problem, half: int) -> Rotation:
    cos, sin = problem.rotary_cos, problem.rotary_sin
    if not half or cos is None or sin is None:
        return Rotation(None, None, None, None, None)
    addresses = Address("rotary_cos", cos.dtype), Address("rotary_sin", sin.dtype)
    return Rotation(*addresses, i64(cos.strides[0]), i64(sin.strides[0]), i32(cos.shape[0]))


def _cache(problem: Problem) -> Cache:
    pages = problem.block_table
    return Cache(
        Address("cache_seqlens", "int32"),
        None if problem.cache_batch_idx is None else Address("cache_batch_idx", "int32"),
        None if pages is None else Address("block_table", "int32"),
        i64(0 if pages is None else pages.shape[1]),
        i32(problem.seqlen_k),
        i32(problem.k.shape[0]),
        i32(problem.page_size),
    )
