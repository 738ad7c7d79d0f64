"""Second derivatives: gradients of <dout, tout> + <dlse, tlse>. tangent.py writes tout, tlse and g = <dout, tout>.

    w = D <do, v>     e = D <do, tv>     ds = P (w - delta)     ds' = P ((u - tlse) (w - delta) + e - g)
    dt = f' ds        dt' = f' ds' + f'' x ds
    dq' = scale (dt' k + dt tk)     dk' = scale (dt'^T q + dt^T tq)     dv' = (P D (u - tlse))^T do     dbias' = ds'
    dsink' = -sum P_sink ((tsink - tlse) delta + g)

Programs own tiles of keys, of queries or of dbias, as in backward.py and dbias.py, so no atomics are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import Terms, probabilities, row_bounds, row_lse, row_tiles, rows_at, rows_of_sequence
from .dbias import overlaps, reduction_term, store_total
from .forward import place, rows_of
from .tangent import Along, dot_transposed, load_chunks, score_tangent, visible_keys
from .tiles import LOG2E, Rows, bounds, dot, kept, key_tiles, narrow, sequence, store
from .views import Sizes, Tables


class Statistics(NamedTuple):
    """Arrays of queries: q, dout and, for each query, lse, delta, tlse and g."""

    q: Any
    dout: Any
    lse: Any
    delta: Any
    tlse: Any
    g: Any


class Queries(NamedTuple):
    """Tile of queries: q, its tangent and do in chunks; log2(e) lse, delta, tlse and g."""

    q0: Any
    q1: Any
    tq0: Any
    tq1: Any
    do0: Any
    do1: Any
    lse: Any
    delta: Any
    tlse: Any
    g: Any


class Keys(NamedTuple):
    """Tile of keys: k, v and their tangents in chunks."""

    k0: Any
    k1: Any
    v0: Any
    v1: Any
    tk0: Any
    tk1: Any
    tv0: Any
    tv1: Any


class Second(NamedTuple):
    """Tile of derivatives of the scores: P (u - tlse), ds', dt and dt'."""

    moved: Any
    ds2: Any
    dt: Any
    dt2: Any


@triton.jit
def load_queries(
    start_q, head, given, along, seq,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    r, first = tl.arange(0, TILE_Q), seq.row_q + start_q
    used = start_q + r < seq.n_q
    q0, q1 = load_chunks(rows_at(given.q, seq.index, head, first, r), used, EDGE, D0, D1, HEAD_DIM)
    tq0, tq1 = q0, q1
    if along.tq is not None:
        tq0, tq1 = load_chunks(rows_at(along.tq, seq.index, head, first, r), used, EDGE, D0, D1, HEAD_DIM)
    do0, do1 = load_chunks(rows_at(given.dout, seq.index, head, first, r), used, EDGE, E0, E1, HEAD_DIM_V)
    return Queries(
        q0, q1, tq0, tq1, narrow(do0, q0.dtype), narrow(do1, q0.dtype),
        row_lse(rows_at(given.lse, seq.index, head, first, r), used, EDGE),
        tl.load(rows_at(given.delta, seq.index, head, first, r), mask=used, other=0.0),
        tl.load(rows_at(given.tlse, seq.index, head, first, r), mask=used, other=0.0),
        tl.load(rows_at(given.g, seq.index, head, first, r), mask=used, other=0.0),
    )  # fmt: skip


@triton.jit
def load_keys(
    start, kv_head, keys, k, v, along, seq,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    r, first = tl.arange(0, TILE_K), seq.row_k + start
    k0, k1 = load_chunks(rows_at(k, seq.index, kv_head, first, r), keys, EDGE, D0, D1, HEAD_DIM)
    v0, v1 = load_chunks(rows_at(v, seq.index, kv_head, first, r), keys, EDGE, E0, E1, HEAD_DIM_V)
    tk0, tk1, tv0, tv1 = k0, k1, v0, v1
    if along.tk is not None:
        tk0, tk1 = load_chunks(rows_at(along.tk, seq.index, kv_head, first, r), keys, EDGE, D0, D1, HEAD_DIM)
    if along.tv is not None:
        tv0, tv1 = load_chunks(rows_at(along.tv, seq.index, kv_head, first, r), keys, EDGE, E0, E1, HEAD_DIM_V)
    return Keys(k0, k1, v0, v1, tk0, tk1, tv0, tv1)


@triton.jit
def second_terms(
    s, x, w, e, lse, delta, tlse, g, row, j, start, keep, b, along, terms, EDGE: tl.constexpr, LOWER: tl.constexpr
):
    """Compute the derivatives of a tile of scores, in either orientation. keep: entries that dropout keeps."""
    p, slope, curvature = probabilities(s, lse, row, j, start, b, terms, EDGE, LOWER)
    x *= terms.scalars.scale
    centred = score_tangent(x, p, slope, row, j, b, along.tbias, EDGE, LOWER) - tlse
    moved = p * centred
    if terms.dropout is not None:
        w = tl.where(keep, w * terms.dropout.factor, 0.0)
        e = tl.where(keep, e * terms.dropout.factor, 0.0)
        moved = tl.where(keep, moved, 0.0)
    ds = p * (w - delta)
    ds2 = p * (centred * (w - delta) + e - g)
    return Second(moved, ds2, ds * slope, ds2 * slope + ds * x * curvature)


@triton.jit
def attention_second_dkv(
    q, k, v, dout, lse, delta, tlse, g, tq, tk, tv, tbias, dk, dv, bias, mask, heads, tables, sizes, interval, scalars,
    dropout, schedule,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk' and dv' of a tile of keys."""
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
    given, along = Statistics(q, dout, lse, delta, tlse, g), Along(tq, tk, tv, tbias)
    own = load_keys(start, kv_head, low < high, k, v, along, seq, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True)
    dk0 = tl.zeros([TILE_K, D0], tl.float32)
    dk1 = tl.zeros([TILE_K, D1 if D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([TILE_K, E0], tl.float32)
    dv1 = tl.zeros([TILE_K, E1 if E1 > 0 else 1], tl.float32)
    terms = Terms(bias, mask, heads, sizes, scalars, dropout)
    for n_head in range(0, sizes.group):
        h = kv_head * sizes.group + n_head
        for t in range(full, edge):
            dk0, dk1, dv0, dv1 = visit_rows(
                t * TILE_Q, h, dk0, dk1, dv0, dv1, own, given, along, j, start, seq, interval, terms,
                HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q, TILE_K, False, LOWER, PRECISION,
            )  # fmt: skip
        for n in range(0, full - begin + end - edge):
            t = tl.where(n < full - begin, begin + n, edge + n - (full - begin))
            dk0, dk1, dv0, dv1 = visit_rows(
                t * TILE_Q, h, dk0, dk1, dv0, dv1, own, given, along, j, start, seq, interval, terms,
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
def visit_rows(
    start_q, h, dk0, dk1, dv0, dv1, own, given, along, j, start, seq, interval, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries. Scores are transposed: (tile_k, tile_q)."""
    i = start_q + tl.arange(0, TILE_Q)
    used = i < seq.n_q
    low, high = bounds(i, seq, interval)
    position = i.to(tl.int64) + seq.offset + seq.leftpad
    row = Rows(i[None, :], h, low[None, :], high[None, :], position[None, :], used[None, :])
    x = load_queries(start_q, h, given, along, seq, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q, EDGE)
    zero = tl.zeros([TILE_K, TILE_Q], tl.float32)
    s = dot_transposed(own.k0, own.k1, x.q0, x.q1, zero, D1, PRECISION)
    ts, e = zero, zero
    if along.tq is not None:
        ts = dot_transposed(own.k0, own.k1, x.tq0, x.tq1, ts, D1, PRECISION)
    if along.tk is not None:
        ts = dot_transposed(own.tk0, own.tk1, x.q0, x.q1, ts, D1, PRECISION)
    w = dot_transposed(own.v0, own.v1, x.do0, x.do1, zero, E1, PRECISION)
    if along.tv is not None:
        e = dot_transposed(own.tv0, own.tv1, x.do0, x.do1, e, E1, PRECISION)
    keep = used[None, :]
    if terms.dropout is not None:
        turned = Rows(i[:, None], h, low, high, position, used)
        keep = tl.trans(kept(terms.dropout, turned, start, seq.index, terms.sizes, TILE_K))
    found = second_terms(
        s, ts, w, e, x.lse[None, :], x.delta[None, :], x.tlse[None, :], x.g[None, :], row, j[:, None], start, keep,
        seq.index, along, terms, EDGE, LOWER,
    )  # fmt: skip
    moved, dt2 = narrow(found.moved, x.q0.dtype), narrow(found.dt2, x.q0.dtype)
    dv0, dk0 = dot(moved, x.do0, dv0, PRECISION), dot(dt2, x.q0, dk0, PRECISION)
    if E1 > 0:
        dv1 = dot(moved, x.do1, dv1, PRECISION)
    if D1 > 0:
        dk1 = dot(dt2, x.q1, dk1, PRECISION)
    if along.tq is not None:
        dt = narrow(found.dt, x.q0.dtype)
        dk0 = dot(dt, x.tq0, dk0, PRECISION)
        if D1 > 0:
            dk1 = dot(dt, x.tq1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_second_dq(
    q, k, v, dout, lse, delta, tlse, g, tq, tk, tv, tbias, dq, bias, mask, heads, tables, sizes, interval, scalars,
    dropout, schedule,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    HOLES: tl.constexpr, PRECISION: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Write dq' of a tile of queries."""
    tile, b, head, row_q, length = place(tl.program_id(0), tables, sizes, schedule, False, TILE_Q, LAST_FIRST)
    seq = sequence(b, row_q, length, tables, sizes, TOP_LEFT)
    start_q = tile * TILE_Q
    if start_q >= length:
        return
    last = tl.minimum(start_q + TILE_Q, seq.n_q) - 1
    begin, full, edge, end, low, high = key_tiles(start_q, last, seq, interval, 0, 1, TILE_K)
    given, along = Statistics(q, dout, lse, delta, tlse, g), Along(tq, tk, tv, tbias)
    own = load_queries(start_q, head, given, along, seq, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q, True)
    r = tl.arange(0, TILE_Q)
    row = rows_of(start_q + r, start_q + r, head, seq, sizes, interval, False)
    dq0 = tl.zeros([TILE_Q, D0], tl.float32)
    dq1 = tl.zeros([TILE_Q, D1 if D1 > 0 else 1], tl.float32)
    terms = Terms(bias, mask, heads, sizes, scalars, dropout)
    for t in range(full, edge):
        dq0, dq1 = visit_keys(
            t * TILE_K, dq0, dq1, own, row, k, v, along, low, high, seq, interval, terms,
            HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, False, LOWER, HOLES, PRECISION,
        )  # fmt: skip
    for n in range(0, full - begin + end - edge):
        t = tl.where(n < full - begin, begin + n, edge + n - (full - begin))
        dq0, dq1 = visit_keys(
            t * TILE_K, dq0, dq1, own, row, k, v, along, low, high, seq, interval, terms,
            HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True, LOWER, HOLES, PRECISION,
        )  # fmt: skip
    owned = start_q + r < length
    dq_rows = rows_at(dq, b, head, row_q + start_q, r)
    store(dq_rows, dq0 * scalars.scale, owned, 0, D0, HEAD_DIM)
    if D1 > 0:
        store(dq_rows, dq1 * scalars.scale, owned, D0, D1, HEAD_DIM)


@triton.jit
def visit_keys(
    start, dq0, dq1, own, row, k, v, along, low, high, seq, interval, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr, HOLES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys."""
    found, x = tile_second(
        start, own, row, k, v, along, low, high, seq, interval, terms,
        HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, EDGE, LOWER, HOLES, PRECISION,
    )  # fmt: skip
    dt2 = narrow(found.dt2, x.k0.dtype)
    dq0 = dot(dt2, x.k0, dq0, PRECISION)
    if D1 > 0:
        dq1 = dot(dt2, x.k1, dq1, PRECISION)
    if along.tk is not None:
        dt = narrow(found.dt, x.k0.dtype)
        dq0 = dot(dt, x.tk0, dq0, PRECISION)
        if D1 > 0:
            dq1 = dot(dt, x.tk1, dq1, PRECISION)
    return dq0, dq1


@triton.jit
def tile_second(
    start, own, row, k, v, along, low, high, seq, interval, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr, HOLES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the derivatives of a tile of scores (tile_q, tile_k), and the keys that were read."""
    j = start + tl.arange(0, TILE_K)
    keys = visible_keys(j, low, high, seq, interval, EDGE, HOLES)
    x = load_keys(
        start, row.head // terms.sizes.group, keys, k, v, along, seq,
        HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, EDGE,
    )  # fmt: skip
    zero = tl.zeros([own.q0.shape[0], TILE_K], tl.float32)
    s = dot_transposed(own.q0, own.q1, x.k0, x.k1, zero, D1, PRECISION)
    ts, e = zero, zero
    if along.tq is not None:
        ts = dot_transposed(own.tq0, own.tq1, x.k0, x.k1, ts, D1, PRECISION)
    if along.tk is not None:
        ts = dot_transposed(own.q0, own.q1, x.tk0, x.tk1, ts, D1, PRECISION)
    w = dot_transposed(own.do0, own.do1, x.v0, x.v1, zero, E1, PRECISION)
    if along.tv is not None:
        e = dot_transposed(own.do0, own.do1, x.tv0, x.tv1, e, E1, PRECISION)
    keep = row.used
    if terms.dropout is not None:
        keep = kept(terms.dropout, row, start, seq.index, terms.sizes, TILE_K)
    found = second_terms(
        s, ts, w, e, own.lse[:, None], own.delta[:, None], own.tlse[:, None], own.g[:, None], row, j[None, :], start,
        keep, seq.index, along, terms, EDGE, LOWER,
    )  # fmt: skip
    return found, x


@triton.jit
def attention_second_dbias(
    q, k, v, dout, lse, delta, tlse, g, tq, tk, tv, tbias, dbias, bias, mask, heads, tables, sizes, interval, scalars,
    dropout, reduction,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    HOLES: tl.constexpr, PRECISION: tl.constexpr, ADD_ROWS: tl.constexpr, ADD_KEYS: tl.constexpr,
):  # fmt: skip
    """Write dbias' of a tile of the bias."""
    given, along = Statistics(q, dout, lse, delta, tlse, g), Along(tq, tk, tv, tbias)
    terms = Terms(bias, mask, heads, sizes, scalars, dropout)
    total = tl.zeros([TILE_Q, TILE_K], tl.float32)
    count = reduction.add_batch * reduction.add_heads * reduction.add_rows * reduction.add_keys
    share = tl.cdiv(count, reduction.parts)
    part = tl.program_id(1)
    for n in range(part * share, tl.minimum(part * share + share, count)):
        start, start_q, head, b = reduction_term(n, reduction, TILE_Q, TILE_K)
        seq = sequence(b, b * 0, sizes.seqlen_q, tables, sizes, TOP_LEFT)
        hit, low, high = overlaps(start, start_q, seq, interval, TILE_Q, TILE_K)
        if hit:
            own = load_queries(start_q, head, given, along, seq, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_Q, True)
            i = start_q + tl.arange(0, TILE_Q)
            found, _keys = tile_second(
                start, own, rows_of(i, i, head, seq, sizes, interval, False), k, v, along, low, high, seq, interval,
                terms, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True, LOWER, HOLES, PRECISION,
            )  # fmt: skip
            total += found.ds2
    store_total(total, dbias, sizes, reduction, TILE_Q, TILE_K, ADD_ROWS, ADD_KEYS)


@triton.jit
def attention_second_dsink(sink, tsink, lse, tlse, delta, g, dsink, rows, count, TILE: tl.constexpr):
    """Compute dsink' of one head per program. count: queries of all batch entries; rows: queries of one batch entry."""
    h = tl.program_id(0).to(tl.int64)
    logit = tl.load(sink + h)
    moved = 0.0
    if tsink is not None:
        moved = tl.load(tsink + h)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        n = start + tl.arange(0, TILE)
        b, i, inside = (n // rows).to(tl.int64), (n % rows).to(tl.int64), n < count
        rate = tl.load(tlse.pointer + b * tlse.batch + h * tlse.head + i * tlse.row, mask=inside, other=0.0)
        part = tl.load(delta.pointer + b * delta.batch + h * delta.head + i * delta.row, mask=inside, other=0.0)
        part = (moved - rate) * part + tl.load(g.pointer + b * g.batch + h * g.head + i * g.row, mask=inside, other=0.0)
        below = logit - tl.load(lse.pointer + b * lse.batch + h * lse.head + i * lse.row, mask=inside, other=0.0)
        # The exponent is 0 for a query without visible keys. delta is 0 for unused queries, whatever their lse.
        total += tl.where(part != 0, tl.exp2(tl.minimum(below, 0.0) * LOG2E) * part, 0.0)
    tl.store(dsink + h, tl.where(logit > float("-inf"), -tl.sum(total, 0), 0.0))
