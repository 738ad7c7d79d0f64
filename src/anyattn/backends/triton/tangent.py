"""Tangents of out and lse along tq, tk, tv, tbias and tsink. P comes from the saved lse, so one sweep suffices.

    u = f' scale (tq k + q tk) + tbias
    tlse = sum_j P u + P_sink tsink          tout = sum_j P D (u v + tv) - tlse out

f' is the derivative of the softcap, and D are the factors of dropout. A tangent that is None costs nothing, because its
products are not compiled. The pass of second derivatives also needs <dout, tout> of each query, which it stores next to
tout. A program owns a tile of queries. `definition/derivatives.py` has all formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import Terms, probabilities, row_bounds, row_lse, rows_at
from .forward import place, rows_of
from .tiles import LOG2E, dense, dot, is_visible, kept, key_tiles, load, narrow, sequence, slots, store


class Along(NamedTuple):
    """Tangents of q, k, v and bias. None: zeros."""

    tq: Any
    tk: Any
    tv: Any
    tbias: Any


class Queries(NamedTuple):
    """Tile of queries that a program owns: positions, q and its tangent in chunks, and log2(e) lse."""

    row: Any
    q0: Any
    q1: Any
    tq0: Any
    tq1: Any
    lse: Any


@triton.jit
def attention_tangent(
    q, k, v, out, lse, tq, tk, tv, tbias, tsink, dout, tout, tlse, inner, bias, mask, heads, tables, sizes, interval,
    scalars, dropout, schedule,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    HOLES: tl.constexpr, PRECISION: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Write tout and tlse and, if dout is given, inner = <dout, tout>."""
    tile, b, head, row_q, length = place(tl.program_id(0), tables, sizes, schedule, False, TILE_Q, LAST_FIRST)
    seq = sequence(b, row_q, length, tables, sizes, TOP_LEFT)
    start_q = tile * TILE_Q
    if start_q >= length:
        return
    last = tl.minimum(start_q + TILE_Q, seq.n_q) - 1
    begin, full, edge, end, low, high = key_tiles(start_q, last, seq, interval, 0, 1, TILE_K)
    r, first = tl.arange(0, TILE_Q), row_q + start_q
    i = start_q + r
    used = i < seq.n_q
    q0, q1 = load_chunks(rows_at(q, b, head, first, r), used, True, D0, D1, HEAD_DIM)
    tq0, tq1 = q0, q1
    if tq is not None:
        tq0, tq1 = load_chunks(rows_at(tq, b, head, first, r), used, True, D0, D1, HEAD_DIM)
    top = row_lse(rows_at(lse, b, head, first, r), used, True)
    own = Queries(rows_of(i, i, head, seq, sizes, interval, False), q0, q1, tq0, tq1, top[:, None])
    along, terms = Along(tq, tk, tv, tbias), Terms(bias, mask, heads, sizes, scalars, dropout)
    total = tl.zeros([TILE_Q], tl.float32)
    acc0 = tl.zeros([TILE_Q, E0], tl.float32)
    acc1 = tl.zeros([TILE_Q, E1 if E1 > 0 else 1], tl.float32)
    for t in range(full, edge):
        total, acc0, acc1 = visit_keys(
            t * TILE_K, total, acc0, acc1, own, k, v, along, low, high, seq, interval, tables, terms,
            HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, False, LOWER, HOLES, PRECISION,
        )  # fmt: skip
    for n in range(0, full - begin + end - edge):
        t = tl.where(n < full - begin, begin + n, edge + n - (full - begin))
        total, acc0, acc1 = visit_keys(
            t * TILE_K, total, acc0, acc1, own, k, v, along, low, high, seq, interval, tables, terms,
            HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True, LOWER, HOLES, PRECISION,
        )  # fmt: skip
    if tsink is not None:
        total += tl.exp2(tl.load(heads.sink + head) * LOG2E - top) * tl.load(tsink + head)
    factor = 1.0 if dropout is None else dropout.factor
    owned = i < length
    out_rows, tout_rows = rows_at(out, b, head, first, r), rows_at(tout, b, head, first, r)
    acc0 = acc0 * factor - total[:, None] * load(out_rows, used, True, 0, E0, HEAD_DIM_V).to(tl.float32)
    store(tout_rows, acc0, owned, 0, E0, HEAD_DIM_V)
    if E1 > 0:
        acc1 = acc1 * factor - total[:, None] * load(out_rows, used, True, E0, E1, HEAD_DIM_V).to(tl.float32)
        store(tout_rows, acc1, owned, E0, E1, HEAD_DIM_V)
    tl.store(rows_at(tlse, b, head, first, r), total, mask=owned)
    if dout is not None:
        do_rows = rows_at(dout, b, head, first, r)
        g = tl.sum(acc0 * load(do_rows, used, True, 0, E0, HEAD_DIM_V).to(tl.float32), 1)
        if E1 > 0:
            g += tl.sum(acc1 * load(do_rows, used, True, E0, E1, HEAD_DIM_V).to(tl.float32), 1)
        tl.store(rows_at(inner, b, head, first, r), g, mask=owned)


@triton.jit
def visit_keys(
    start, total, acc0, acc1, own, k, v, along, low, high, seq, interval, tables, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr, HOLES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to sum P u, and to sum P D (u v + tv)."""
    MOVED: tl.constexpr = along.tq is not None or along.tk is not None or along.tbias is not None
    j = start + tl.arange(0, TILE_K)
    keys = visible_keys(j, low, high, seq, interval, EDGE, HOLES)
    kv_head = own.row.head // terms.sizes.group
    zero = tl.zeros([own.q0.shape[0], TILE_K], tl.float32)
    k0, k1 = load_chunks(key_rows(k, start, j, keys, kv_head, seq, tables, terms.sizes), keys, EDGE, D0, D1, HEAD_DIM)
    s = dot_transposed(own.q0, own.q1, k0, k1, zero, D1, PRECISION)
    p, slope, _curvature = probabilities(s, own.lse, own.row, j[None, :], start, seq.index, terms, EDGE, LOWER)
    dropped = p
    if terms.dropout is not None:
        dropped = tl.where(kept(terms.dropout, own.row, start, seq.index, terms.sizes, TILE_K), p, 0.0)
    if MOVED:
        x = zero
        if along.tq is not None:
            x = dot_transposed(own.tq0, own.tq1, k0, k1, x, D1, PRECISION)
        if along.tk is not None:
            tk0, tk1 = load_chunks(
                key_rows(along.tk, start, j, keys, kv_head, seq, tables, terms.sizes), keys, EDGE, D0, D1, HEAD_DIM
            )
            x = dot_transposed(own.q0, own.q1, tk0, tk1, x, D1, PRECISION)
        x *= terms.scalars.scale
        u = score_tangent(x, p, slope, own.row, j[None, :], seq.index, along.tbias, EDGE, LOWER)
        total += tl.sum(p * u, 1)
        rows = key_rows(v, start, j, keys, kv_head, seq, tables, terms.sizes)
        acc0, acc1 = add_values(dropped * u, acc0, acc1, rows, keys, k0.dtype, HEAD_DIM_V, E0, E1, EDGE, PRECISION)
    if along.tv is not None:
        rows = key_rows(along.tv, start, j, keys, kv_head, seq, tables, terms.sizes)
        acc0, acc1 = add_values(dropped, acc0, acc1, rows, keys, k0.dtype, HEAD_DIM_V, E0, E1, EDGE, PRECISION)
    return total, acc0, acc1


@triton.jit
def add_values(
    weights, acc0, acc1, rows, keys, dtype: tl.constexpr, SIZE: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + weights @ values."""
    weights = narrow(weights, dtype)
    acc0 = dot(weights, load(rows, keys, EDGE, 0, E0, SIZE), acc0, PRECISION)
    if E1 > 0:
        acc1 = dot(weights, load(rows, keys, EDGE, E0, E1, SIZE), acc1, PRECISION)
    return acc0, acc1


@triton.jit
def visible_keys(j, low, high, seq, interval, EDGE: tl.constexpr, HOLES: tl.constexpr):
    """Return which key slots some query of the tile may attend to. Memory of other slots may hold NaN."""
    keys = (j >= low) & (j < high)
    if HOLES and EDGE:
        first, last = row_bounds(j, seq, interval)
        keys = keys & (first < last)
    return keys


@triton.jit
def key_rows(view, start, j, keys, kv_head, seq, tables, sizes):
    """Return the addresses of key slots j, which begin at `start`."""
    if tables.block_table is None and tables.cache_batch_idx is None:
        rows = rows_at(view, seq.index, kv_head, seq.row_k + start, j - start)
    else:
        entry, slot = slots(j, keys, seq, tables, sizes)
        rows = view.pointer + entry * view.batch + slot * view.row + kv_head.to(tl.int64) * view.head
    return rows


@triton.jit
def load_chunks(rows, keep, MASKED: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, SIZE: tl.constexpr):
    """Load both chunks of dimensions of a tile. Without a second chunk, the first one is returned twice."""
    x0 = load(rows, keep, MASKED, 0, W0, SIZE)
    x1 = x0
    if W1 > 0:
        x1 = load(rows, keep, MASKED, W0, W1, SIZE)
    return x0, x1


@triton.jit
def dot_transposed(a0, a1, b0, b1, acc, W1: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a @ b^T, over both chunks of dimensions."""
    acc = dot(a0, tl.trans(b0), acc, PRECISION)
    if W1 > 0:
        acc = dot(a1, tl.trans(b1), acc, PRECISION)
    return acc


@triton.jit
def score_tangent(x, p, slope, row, j, b, tbias, EDGE: tl.constexpr, LOWER: tl.constexpr):
    """Return u, 0 for masked keys. x: tangents of the scaled products."""
    u = x * slope
    if tbias is not None:
        keep = row.used
        if EDGE:
            keep = is_visible(row, j, EDGE, LOWER)
        u += tl.load(dense(tbias, b, row, j), mask=keep, other=0.0).to(tl.float32)
    return tl.where(p > 0, u, 0.0)
