"""Gradients of bias and sink: dbias = dS, summed over the axes along which the bias is broadcast, and

    dsink_h = - sum over queries of exp(sink_h - lse) delta

A program owns a tile of dbias and adds all its terms in a fixed order. If there are few tiles, several programs compute
partial sums, which are then added in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import Terms, load_query_tile, tile_gradient
from .tiles import LOG2E, bounds, narrow, sequence


class BiasReduction(NamedTuple):
    """Numbers of batch entries, heads, tiles of queries and tiles of keys.

    The first three belong to all programs together. The `add_` numbers are summed by one program.
    """

    heads: Any
    rows: Any
    keys: Any
    add_batch: Any
    add_heads: Any
    add_rows: Any
    add_keys: Any
    parts: Any
    elements: Any


@triton.jit
def attention_backward_dbias(
    q, k, v, dout, lse, delta, dbias, bias, mask, heads, tables, sizes, interval, scalars, dropout, reduction,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    HOLES: tl.constexpr, PRECISION: tl.constexpr, ADD_ROWS: tl.constexpr, ADD_KEYS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([TILE_Q, TILE_K], tl.float32)
    count = reduction.add_batch * reduction.add_heads * reduction.add_rows * reduction.add_keys
    share = tl.cdiv(count, reduction.parts)
    part = tl.program_id(1)
    for n in range(part * share, tl.minimum(part * share + share, count)):
        start, start_q, head, b = reduction_term(n, reduction, TILE_Q, TILE_K)
        seq = sequence(b, b * 0, sizes.seqlen_q, tables, sizes, TOP_LEFT)
        hit, low, high = overlaps(start, start_q, seq, interval, TILE_Q, TILE_K)
        if hit:
            own = load_query_tile(
                start_q, q, dout, lse, delta, head, seq, sizes, interval, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q
            )
            ds, _slope, _k0, _k1, _s, _scales = tile_gradient(
                start, own, k, v, low, high, seq, interval, Terms(bias, mask, heads, sizes, scalars, dropout),
                HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True, LOWER, HOLES, PRECISION,
            )  # fmt: skip
            total += ds
    store_total(total, dbias, sizes, reduction, TILE_Q, TILE_K, ADD_ROWS, ADD_KEYS)


@triton.jit
def own_tile(reduction):
    """Return the tile of dbias that the program owns: (batch entry, head, tile of queries, tile of keys)."""
    program = tl.program_id(0)
    key, row = program % reduction.keys, program // reduction.keys % reduction.rows
    head = program // (reduction.keys * reduction.rows) % reduction.heads
    return program // (reduction.keys * reduction.rows * reduction.heads), head, row, key


@triton.jit
def reduction_term(n, reduction, TILE_Q: tl.constexpr, TILE_K: tl.constexpr):
    """Return the n-th tile of scores that the program adds: (first key, first query, head, batch entry)."""
    own_batch, own_head, own_row, own_key = own_tile(reduction)
    start = (own_key + n % reduction.add_keys) * TILE_K
    start_q = (own_row + n // reduction.add_keys % reduction.add_rows) * TILE_Q
    head = own_head + n // (reduction.add_keys * reduction.add_rows) % reduction.add_heads
    return start, start_q, head, own_batch + n // (reduction.add_keys * reduction.add_rows * reduction.add_heads)


@triton.jit
def overlaps(start, start_q, seq, interval, TILE_Q: tl.constexpr, TILE_K: tl.constexpr):
    """Return (whether a query of the tile attends to a key of the tile, first and one-past-last visible key)."""
    last = tl.minimum(start_q + TILE_Q, seq.n_q) - 1
    low, _high = bounds(start_q, seq, interval)
    _low, high = bounds(last, seq, interval)
    return (start_q <= last) & (start < high) & (start + TILE_K > low), low, high


@triton.jit
def store_total(
    total, dbias, sizes, reduction, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, ADD_ROWS: tl.constexpr,
    ADD_KEYS: tl.constexpr,
):  # fmt: skip
    """Write the program's part of dbias, after the sum over its rows and keys where the bias is broadcast."""
    own_batch, own_head, own_row, own_key = own_tile(reduction)
    i, j = own_row * TILE_Q + tl.arange(0, TILE_Q), own_key * TILE_K + tl.arange(0, TILE_K)
    keep = (i < sizes.seqlen_q)[:, None] & (j < sizes.seqlen_k)[None, :]
    i, j = i[:, None].to(tl.int64), j[None, :].to(tl.int64)
    if ADD_ROWS:
        total, i = tl.sum(total, 0, keep_dims=True), tl.zeros([1, 1], tl.int64)
        keep = j < sizes.seqlen_k
    if ADD_KEYS:
        total, j = tl.sum(total, 1, keep_dims=True), tl.zeros([1, 1], tl.int64)
        keep = i < (1 if ADD_ROWS else sizes.seqlen_q)
    place = dbias.pointer + own_batch.to(tl.int64) * dbias.batch + own_head.to(tl.int64) * dbias.head
    place += tl.program_id(1).to(tl.int64) * reduction.elements + i * dbias.row + j * dbias.key
    tl.store(place, narrow(total, dbias.pointer.dtype.element_ty), mask=keep)


@triton.jit
def sum_parts(parts, result, count, elements, TILE: tl.constexpr):
    """Compute result[e] = sum over n < count of parts[n, e]."""
    e = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for n in range(0, count):
        total += tl.load(parts + n * elements + e, mask=e < elements, other=0.0)
    tl.store(result + e, narrow(total, result.dtype.element_ty), mask=e < elements)


@triton.jit
def attention_backward_dsink(sink, lse, delta, dsink, rows, count, TILE: tl.constexpr):
    """Compute dsink of one head per program. count: queries of all batch entries; rows: queries of one batch entry."""
    h = tl.program_id(0).to(tl.int64)
    logit = tl.load(sink + h)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        n = start + tl.arange(0, TILE)
        b, i = (n // rows).to(tl.int64), (n % rows).to(tl.int64)
        part = tl.load(delta.pointer + b * delta.batch + h * delta.head + i * delta.row, mask=n < count, other=0.0)
        below = logit - tl.load(lse.pointer + b * lse.batch + h * lse.head + i * lse.row, mask=n < count, other=0.0)
        # The exponent is 0 for a query without visible keys. delta is 0 for unused queries, whatever their lse.
        total += tl.where(part != 0, tl.exp2(tl.minimum(below, 0.0) * LOG2E) * part, 0.0)
    tl.store(dsink + h, tl.where(logit > float("-inf"), -tl.sum(total, 0), 0.0))
