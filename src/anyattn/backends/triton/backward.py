"""Backward pass. The probabilities are recomputed: P = 2^(x - log2(e) lse) with x = log2(e) s. D: dropout factors.

    delta = rowsum(dO O) - dlse        dP = D (dO V^T)               dS = P (dP - delta)
    dT = dS (1 - (t / softcap)^2)      dQ = scale dT K               dK = scale dT^T Q               dV = (P D)^T dO

One kernel owns tiles of keys and visits the queries that attend to them, head by head of the group. Another kernel owns
tiles of queries and visits their visible keys. No two programs write to the same memory, so no atomics are needed and
results are the same from run to run. Full tiles come first, without a mask, as in forward.py.
Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023), algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .forward import place, rows_of
from .stored import add_product, load_stored, scales, weigh
from .tile_lists import count_edges, edge_tile, listed_tile, walk_tiles
from .tiles import (
    LOG2E,
    Rows,
    bounds,
    capped,
    clamp,
    dot,
    first_row,
    kept,
    key_tiles,
    load,
    narrow,
    scores,
    sequence,
    store,
)
from .views import Sizes, Tables


class Terms(NamedTuple):
    """Parameters that turn a product into a score and its gradient, except positions.

    Kernels make it in the call that takes it, because Triton assigns no tuple that contains a function to a name.
    """

    bias: Any
    mask: Any
    heads: Any
    sizes: Any
    scalars: Any
    dropout: Any


@triton.jit
def attention_backward_delta(
    out, dout, dlse, delta, tables, sizes, schedule,
    HEAD_DIM_V: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, TILE_Q: tl.constexpr, TOP_LEFT: tl.constexpr,
):  # fmt: skip
    """Compute delta of every query; 0 for unused queries."""
    tile, b, head, row_q, length = place(tl.program_id(0), tables, sizes, schedule, False, TILE_Q, False)
    seq = sequence(b, row_q, length, tables, sizes, TOP_LEFT)
    r = tl.arange(0, TILE_Q)
    i, first = tile * TILE_Q + r, row_q + tile * TILE_Q
    used = i < seq.n_q
    out_rows, do_rows = rows_at(out, b, head, first, r), rows_at(dout, b, head, first, r)
    total = row_sums(out_rows, do_rows, used, 0, E0, HEAD_DIM_V)
    if E1 > 0:
        total += row_sums(out_rows, do_rows, used, E0, E1, HEAD_DIM_V)
    if dlse is not None:
        total -= tl.load(rows_at(dlse, b, head, first, r), mask=used, other=0.0)
    tl.store(rows_at(delta, b, head, first, r), total, mask=i < length)


@triton.jit
def row_sums(out_rows, do_rows, used, START: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return rowsum(dO O) over one chunk of dimensions."""
    out = load(out_rows, used, True, START, WIDTH, SIZE).to(tl.float32)
    return tl.sum(out * load(do_rows, used, True, START, WIDTH, SIZE).to(tl.float32), 1)


@triton.jit
def rows_at(view, b, head, first, i):
    """Return the addresses of rows first + i:

    64 bits for the tile, and the stride's type inside it, to save registers.
    """
    base = view.pointer + b.to(tl.int64) * view.batch + head.to(tl.int64) * view.head + first.to(tl.int64) * view.row
    return base + i * view.row


@triton.jit
def attention_backward_dkv(
    q, k, v, dout, lse, delta, dk, dv, bias, mask, heads, tables, sizes, interval, scalars, dropout, schedule,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Tables and sizes with which place() iterates over keys and their heads, because Triton 3.6 cannot return None.
    walked = Tables(tables.cu_seqlens_k, None, None, None, None, None, None, None, None)
    by_key = Sizes(sizes.batch, sizes.seqlen_k, 0, sizes.nheads // sizes.group, 1, sizes.rows_k, 0, 0, 0)
    tile, b, kv_head, row_k, length = place(tl.program_id(0), walked, by_key, schedule, False, TILE_K, False)
    start = tile * TILE_K
    if start >= length:
        return
    row_q, rows = rows_of_sequence(b, tables, sizes)
    seq = sequence(b, row_q, rows, tables, sizes, TOP_LEFT)
    begin, full, edge, end = row_tiles(start, start + TILE_K - 1, seq, interval, TILE_Q)

    r = tl.arange(0, TILE_K)
    j = start + r
    low, high = row_bounds(j, seq, interval)
    keys = low < high  # memory of keys that no query attends to may hold NaN
    k_rows, v_rows = rows_at(k, b, kv_head, row_k + start, r), rows_at(v, b, kv_head, row_k + start, r)
    k0 = load(k_rows, keys, True, 0, D0, HEAD_DIM)
    v0 = load(v_rows, keys, True, 0, E0, HEAD_DIM_V)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = load(k_rows, keys, True, D0, D1, HEAD_DIM)
    if E1 > 0:
        v1 = load(v_rows, keys, True, E0, E1, HEAD_DIM_V)
    dk0 = tl.zeros([TILE_K, D0], tl.float32)
    dk1 = tl.zeros([TILE_K, D1 if D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([TILE_K, E0], tl.float32)
    dv1 = tl.zeros([TILE_K, E1 if E1 > 0 else 1], tl.float32)
    for g in range(0, sizes.group):
        h = kv_head * sizes.group + g
        walk = walk_tiles(begin, full, edge, end, b, h, tile, scalars)
        for n in range(walk.full, walk.edge):
            t = listed_tile(n, walk, scalars)
            dk0, dk1, dv0, dv1 = visit_rows(
                t * TILE_Q, h, dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse, delta, j, start, seq, interval,
                Terms(bias, mask, heads, sizes, scalars, dropout),
                HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q, TILE_K, False, LOWER, PRECISION,
            )  # fmt: skip
        for n in range(0, count_edges(walk)):
            t = edge_tile(n, walk, scalars)
            dk0, dk1, dv0, dv1 = visit_rows(
                t * TILE_Q, h, dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse, delta, j, start, seq, interval,
                Terms(bias, mask, heads, sizes, scalars, dropout),
                HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q, TILE_K, True, LOWER, PRECISION,
            )  # fmt: skip
    dk_rows, dv_rows = rows_at(dk, b, kv_head, row_k + start, r), rows_at(dv, b, kv_head, row_k + start, r)
    factor = 1.0 if dropout is None else dropout.factor
    store(dk_rows, dk0 * scalars.scale, j < length, 0, D0, HEAD_DIM)
    store(dv_rows, dv0 * factor, j < length, 0, E0, HEAD_DIM_V)
    if D1 > 0:
        store(dk_rows, dk1 * scalars.scale, j < length, D0, D1, HEAD_DIM)
    if E1 > 0:
        store(dv_rows, dv1 * factor, j < length, E0, E1, HEAD_DIM_V)


@triton.jit
def rows_of_sequence(b, tables, sizes):
    """Return (first row of sequence b in packed q, number of rows)."""
    first = b * 0
    rows = first + sizes.seqlen_q
    if tables.cu_seqlens_q is not None:
        first = first_row(b + 1, tables, sizes)
        rows = first_row(b + 2, tables, sizes) - first
    return first, rows


@triton.jit
def row_bounds(j, seq, interval):
    """Return the first and one-past-last query that may attend to key slots j. Neither bound ever decreases."""
    c = (j - seq.leftpad).to(tl.int64)
    low = c * 0
    high = low + seq.n_q
    if interval.left is not None:
        high = tl.minimum(high, c + interval.left + 1 - seq.offset)
    if interval.right is not None:
        low = tl.maximum(low, c - interval.right - seq.offset)
    if interval.chunk is not None:
        chunk = interval.chunk.to(tl.int64)
        start = c - (c % chunk + chunk) % chunk - seq.offset
        low = tl.maximum(low, start)
        high = tl.minimum(high, start + chunk)
    low = tl.where(j < seq.n_k, tl.minimum(low, seq.n_q), seq.n_q)
    high = tl.where(j < seq.leftpad, 0, tl.maximum(high, 0))
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def row_tiles(first, last, seq, interval, TILE: tl.constexpr):
    """Return tiles of queries for key slots first..last:

    edges [begin, full), full tiles [full, edge), edges [edge, end).
    """
    low_first, _ = row_bounds(tl.maximum(first, seq.leftpad), seq, interval)
    low_last, _ = row_bounds(last, seq, interval)
    _, high_first = row_bounds(first, seq, interval)
    _, high_last = row_bounds(tl.minimum(last, seq.n_k - 1), seq, interval)
    begin = low_first // TILE
    end = tl.maximum(tl.cdiv(high_last, TILE), begin)
    end = tl.where((first < seq.n_k) & (last >= seq.leftpad), end, begin)
    full = clamp(tl.cdiv(low_last, TILE), begin, end)
    edge = clamp(high_first // TILE, full, end)
    return begin, full, edge, end


@triton.jit
def visit_rows(
    start_q, h, dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse, delta, j, start, seq, interval, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries. Scores are transposed: (tile_k, tile_q)."""
    r, first = tl.arange(0, TILE_Q), seq.row_q + start_q
    i = start_q + r
    used = i < seq.n_q
    low, high = bounds(i, seq, interval)
    position = i.to(tl.int64) + seq.offset + seq.leftpad
    row = Rows(i[None, :], h, low[None, :], high[None, :], position[None, :], used[None, :])
    q_rows, do_rows = rows_at(q, seq.index, h, first, r), rows_at(dout, seq.index, h, first, r)
    q0 = load(q_rows, used, EDGE, 0, D0, HEAD_DIM)
    s = dot(k0, tl.trans(q0), tl.zeros([TILE_K, TILE_Q], tl.float32), PRECISION)
    if D1 > 0:
        q1 = load(q_rows, used, EDGE, D0, D1, HEAD_DIM)
        s = dot(k1, tl.trans(q1), s, PRECISION)
    top = row_lse(rows_at(lse, seq.index, h, first, r), used, EDGE)
    p, slope, _curvature = probabilities(s, top[None, :], row, j[:, None], start, seq.index, terms, EDGE, LOWER)
    keep = p > 0
    dropped = p
    if terms.dropout is not None:
        turned = Rows(i[:, None], h, low, high, position, used)
        keep = tl.trans(kept(terms.dropout, turned, start, seq.index, terms.sizes, TILE_K))
        dropped = tl.where(keep, p, 0.0)
    dropped = narrow(dropped, k0.dtype)
    do0 = narrow(load(do_rows, used, EDGE, 0, E0, HEAD_DIM_V), k0.dtype)
    dv0 = dot(dropped, do0, dv0, PRECISION)
    dp = dot(v0, tl.trans(do0), tl.zeros([TILE_K, TILE_Q], tl.float32), PRECISION)
    if E1 > 0:
        do1 = narrow(load(do_rows, used, EDGE, E0, E1, HEAD_DIM_V), k0.dtype)
        dv1 = dot(dropped, do1, dv1, PRECISION)
        dp = dot(v1, tl.trans(do1), dp, PRECISION)
    shift = tl.load(rows_at(delta, seq.index, h, first, r), mask=used, other=0.0)
    dt = product_gradient(score_gradient(p, dp, shift[None, :], keep, terms), slope, terms.scalars)
    dt = narrow(dt, k0.dtype)
    dk0 = dot(dt, q0, dk0, PRECISION)
    if D1 > 0:
        dk1 = dot(dt, q1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def row_lse(pointers, used, EDGE: tl.constexpr):
    """Return log2(e) lse of queries, +inf for queries without visible keys, so that P is 0."""
    value = tl.load(pointers, mask=used, other=float("-inf")) * LOG2E
    if EDGE:
        value = tl.where(value == float("-inf"), float("inf"), value)
    return value


@triton.jit
def probabilities(s, lse, row, j, start, b, terms, EDGE: tl.constexpr, LOWER: tl.constexpr):
    """Return P for a tile of products, the derivative of softcap and score_mod, and the second one of the softcap."""
    UNMASKED: tl.constexpr = terms.mask is None and (terms.scalars.mask is None or terms.scalars.lists is not None)
    UNCHANGED: tl.constexpr = terms.scalars.softcap is None and terms.scalars.score is None
    PLAIN: tl.constexpr = UNMASKED and UNCHANGED and terms.bias is None and terms.heads.slopes is None
    slope, curvature = 1.0, 0.0
    if PLAIN and not EDGE:
        x = s * (terms.scalars.scale * LOG2E)
    else:
        t, slope = capped(s, terms.scalars)
        if terms.scalars.softcap is not None:
            curvature = t * slope * (-2.0 / (terms.scalars.softcap * terms.scalars.softcap))
        x = scores(t, row, j, start, b, terms.bias, terms.mask, terms.heads, terms.scalars, EDGE, LOWER)
        if terms.scalars.slope is not None:
            slope = slope * terms.scalars.slope(t, b, row.head, row.index, j, terms.scalars)
    return tl.exp2(x - lse), slope, curvature


@triton.jit
def score_gradient(p, dp, delta, keep, terms):
    """Return dS. keep: entries that dropout keeps."""
    if terms.dropout is not None:
        dp = tl.where(keep, dp * terms.dropout.factor, 0.0)
    return p * (dp - delta)


@triton.jit
def product_gradient(ds, slope, scalars):
    """Return dT = dS times the derivative; 0 where dS is 0, even if the derivative of score_mod is infinite or NaN."""
    dt = ds * slope
    if scalars.slope is not None:
        dt = tl.where(ds == 0.0, 0.0, dt)
    return dt


@triton.jit
def attention_backward_dq(
    q, k, v, dout, lse, delta, dq, bias, mask, heads, tables, sizes, interval, scalars, dropout, schedule,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    HOLES: tl.constexpr, PRECISION: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    tile, b, head, row_q, length = place(tl.program_id(0), tables, sizes, schedule, False, TILE_Q, LAST_FIRST)
    seq = sequence(b, row_q, length, tables, sizes, TOP_LEFT)
    start_q = tile * TILE_Q
    if start_q >= length:
        return
    last = tl.minimum(start_q + TILE_Q, seq.n_q) - 1
    begin, full, edge, end, low, high = key_tiles(start_q, last, seq, interval, 0, 1, TILE_K)
    own = load_query_tile(
        start_q, q, dout, lse, delta, head, seq, sizes, interval, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q
    )
    dq0 = tl.zeros([TILE_Q, D0], tl.float32)
    dq1 = tl.zeros([TILE_Q, D1 if D1 > 0 else 1], tl.float32)
    walk = walk_tiles(begin, full, edge, end, b, head, tile, scalars)
    for n in range(walk.full, walk.edge):
        t = listed_tile(n, walk, scalars)
        dq0, dq1 = visit_keys(
            t * TILE_K, dq0, dq1, own, k, v, low, high, seq, interval,
            Terms(bias, mask, heads, sizes, scalars, dropout),
            HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, False, LOWER, HOLES, PRECISION,
        )  # fmt: skip
    for n in range(0, count_edges(walk)):
        t = edge_tile(n, walk, scalars)
        dq0, dq1 = visit_keys(
            t * TILE_K, dq0, dq1, own, k, v, low, high, seq, interval,
            Terms(bias, mask, heads, sizes, scalars, dropout),
            HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True, LOWER, HOLES, PRECISION,
        )  # fmt: skip
    r = tl.arange(0, TILE_Q)
    owned = start_q + r < length
    dq_rows = rows_at(dq, b, head, row_q + start_q, r)
    store(dq_rows, dq0 * scalars.scale, owned, 0, D0, HEAD_DIM)
    if D1 > 0:
        store(dq_rows, dq1 * scalars.scale, owned, D0, D1, HEAD_DIM)


class QueryTile(NamedTuple):
    """Tile of queries that a program owns: positions, q and dO in chunks, lse and delta."""

    row: Any
    q0: Any
    q1: Any
    do0: Any
    do1: Any
    lse: Any
    delta: Any


@triton.jit
def load_query_tile(
    start_q, q, dout, lse, delta, head, seq, sizes, interval, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, TILE_Q: tl.constexpr,
):  # fmt: skip
    r, first = tl.arange(0, TILE_Q), seq.row_q + start_q
    i = start_q + r
    used = i < seq.n_q
    q_rows, do_rows = rows_at(q, seq.index, head, first, r), rows_at(dout, seq.index, head, first, r)
    q0 = load(q_rows, used, True, 0, D0, HEAD_DIM)
    do0 = narrow(load(do_rows, used, True, 0, E0, HEAD_DIM_V), q0.dtype)
    q1, do1 = q0, do0
    if D1 > 0:
        q1 = load(q_rows, used, True, D0, D1, HEAD_DIM)
    if E1 > 0:
        do1 = narrow(load(do_rows, used, True, E0, E1, HEAD_DIM_V), q0.dtype)
    top = row_lse(rows_at(lse, seq.index, head, first, r), used, True)
    shift = tl.load(rows_at(delta, seq.index, head, first, r), mask=used, other=0.0)
    return QueryTile(rows_of(i, i, head, seq, sizes, interval, False), q0, q1, do0, do1, top[:, None], shift[:, None])


@triton.jit
def visit_keys(
    start, dq0, dq1, own, k, v, low, high, seq, interval, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr, HOLES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys."""
    ds, slope, k0, k1, _s, of_k = tile_gradient(
        start, own, k, v, low, high, seq, interval, terms,
        HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, EDGE, LOWER, HOLES, PRECISION,
    )  # fmt: skip
    dt, top = product_gradient(ds, slope, terms.scalars), 1.0
    if k.scale is not None:
        dt, top = weigh(dt, of_k, k, k0.dtype)
    dt = narrow(dt, k0.dtype)
    dq0 = add_product(dt, k0, dq0, k, top, PRECISION)
    if D1 > 0:
        dq1 = add_product(dt, k1, dq1, k, top, PRECISION)
    return dq0, dq1


@triton.jit
def tile_gradient(
    start, own, k, v, low, high, seq, interval, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr, HOLES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dS of a tile (tile_q, tile_k), the derivative of softcap and score_mod, the keys, products, and scales."""
    r = tl.arange(0, TILE_K)
    j = start + r
    keys = (j >= low) & (j < high)  # outside this range, memory may hold NaN
    if HOLES and EDGE:
        first, last = row_bounds(j, seq, interval)
        keys = keys & (first < last)
    kv_head = own.row.head // terms.sizes.group
    k_rows, v_rows = (
        rows_at(k, seq.index, kv_head, seq.row_k + start, r),
        rows_at(v, seq.index, kv_head, seq.row_k + start, r),
    )
    k0 = load_stored(k_rows, keys, own.q0.dtype, EDGE, 0, D0, HEAD_DIM)
    zero = tl.zeros([own.q0.shape[0], TILE_K], tl.float32)
    s = dot(own.q0, tl.trans(k0), zero, PRECISION)
    k1 = k0
    if D1 > 0:
        k1 = load_stored(k_rows, keys, own.q0.dtype, EDGE, D0, D1, HEAD_DIM)
        s = dot(own.q1, tl.trans(k1), s, PRECISION)
    of_k = 1.0
    if k.scale is not None:
        of_k = scales(k, seq.entry_k, seq.row_k.to(tl.int64) + j, kv_head, keys, seq)
        s = s * of_k
    p, slope, _curvature = probabilities(s, own.lse, own.row, j[None, :], start, seq.index, terms, EDGE, LOWER)
    dp = dot(own.do0, tl.trans(load_stored(v_rows, keys, own.q0.dtype, EDGE, 0, E0, HEAD_DIM_V)), zero, PRECISION)
    if E1 > 0:
        v1 = load_stored(v_rows, keys, own.q0.dtype, EDGE, E0, E1, HEAD_DIM_V)
        dp = dot(own.do1, tl.trans(v1), dp, PRECISION)
    if v.scale is not None:
        dp = dp * scales(v, seq.entry_k, seq.row_k.to(tl.int64) + j, kv_head, keys, seq)
    keep = p > 0
    if terms.dropout is not None:
        keep = kept(terms.dropout, own.row, start, seq.index, terms.sizes, TILE_K)
    return score_gradient(p, dp, own.delta, keep, terms), slope, k0, k1, s, of_k
