"""Forward pass: a program owns a tile of queries and visits their tiles of visible keys, computing

    m' = max(m, max_j x_j)                        l' = l 2^(m - m') + sum_j 2^(x_j - m')
    acc' = acc 2^(m - m') + sum_j 2^(x_j - m') v_j

with x = log2(e) s. Full tiles come first, without a mask, then the tiles that an edge of the mask crosses.
Dimensions are split into two chunks of powers of two, so 96 is 64 + 32 instead of 128.

With PACK a tile holds pairs (query, head of the group), so that keys are read once per KV head; decoding uses it.
With SPLIT several programs share the keys of a tile of queries and write partial results, which decode.py combines.
Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023), algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stored import add_product, load_stored, scales, weigh
from .tile_lists import count_edges, edge_tile, listed_tile, walk_tiles
from .tiles import (
    LN2,
    LOG2E,
    Rows,
    bounds,
    capped,
    dot,
    find,
    kept,
    key_tiles,
    load,
    narrow,
    scores,
    sequence,
    slots,
    store,
)


@triton.jit
def attention_forward(
    q, k, v, out, lse, bias, mask, heads, tables, sizes, interval, scalars, dropout, schedule,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
    TOP_LEFT: tl.constexpr, LOWER: tl.constexpr, HOLES: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    LAST_FIRST: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    tile, b, head, row_q, length = place(tl.program_id(0), tables, sizes, schedule, PACK, TILE_Q, LAST_FIRST)
    split = tl.program_id(1)
    seq = sequence(b, row_q, length, tables, sizes, TOP_LEFT)
    packed = sizes.group if PACK else 1
    r = tile * TILE_Q + tl.arange(0, TILE_Q)
    i = r // packed
    if tile * TILE_Q >= length * packed:
        return
    row = rows_of(r, i, head, seq, sizes, interval, PACK)
    first = tile * TILE_Q // packed
    last = tl.minimum((tile * TILE_Q + TILE_Q - 1) // packed, seq.n_q - 1)
    begin, full, edge, end, low, high = key_tiles(first, last, seq, interval, split, schedule.splits, TILE_K)

    used = i < seq.n_q
    h = head * packed + r % packed if PACK else head + r * 0
    q_rows = q.pointer + b.to(tl.int64) * q.batch + (row_q + i).to(tl.int64) * q.row + h.to(tl.int64) * q.head
    q0 = load(q_rows, used, True, 0, D0, HEAD_DIM)
    q1 = q0
    if D1 > 0:
        q1 = load(q_rows, used, True, D0, D1, HEAD_DIM)
    kv_head = (head if PACK else head // sizes.group).to(tl.int64)
    m, l = start_row(heads, h, split, SPLIT, TILE_Q)
    acc0 = tl.zeros([TILE_Q, E0], tl.float32)
    acc1 = tl.zeros([TILE_Q, E1 if E1 > 0 else 1], tl.float32)
    walk = walk_tiles(begin, full, edge, end, b, head, tile, scalars)
    for n in range(walk.full, walk.edge):
        t = listed_tile(n, walk, scalars)
        m, l, acc0, acc1 = visit(
            t * TILE_K, m, l, acc0, acc1, q0, q1, k, v, row, seq, low, high, kv_head, bias, mask, heads, tables, sizes,
            scalars, dropout, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, False, LOWER, HOLES, NEGATIVE, PRECISION,
        )  # fmt: skip
    for n in tl.range(0, count_edges(walk), num_stages=EDGE_STAGES):
        t = edge_tile(n, walk, scalars)
        m, l, acc0, acc1 = visit(
            t * TILE_K, m, l, acc0, acc1, q0, q1, k, v, row, seq, low, high, kv_head, bias, mask, heads, tables, sizes,
            scalars, dropout, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True, LOWER, HOLES, NEGATIVE, PRECISION,
        )  # fmt: skip
    finish(m, l, acc0, acc1, out, lse, b, row_q, i, h, used, i < length, split, schedule, dropout, HEAD_DIM_V, E0, E1)


@triton.jit
def place(program, tables, sizes, schedule, PACK: tl.constexpr, TILE_Q: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Return (tile, sequence, head, first row, rows) of a program. The heads of a section alternate, tile by tile."""
    heads = sizes.nheads // sizes.group if PACK else sizes.nheads
    pairs = heads if tables.cu_seqlens_q is not None else heads * sizes.batch
    section = program // (schedule.tiles * schedule.section)
    width = tl.minimum(schedule.section, pairs - section * schedule.section)
    within = program - section * schedule.tiles * schedule.section
    slot = within // width
    pair = section * schedule.section + within % width
    if LAST_FIRST:
        slot = schedule.tiles - 1 - slot
    tile, b, head, first = slot, pair // heads, pair % heads, pair * 0
    rows = first + sizes.seqlen_q
    if tables.cu_seqlens_q is not None:
        tile, b, first, rows = find(slot, tables, sizes, PACK, TILE_Q)
        head = pair
    return tile, b, head, first, rows


@triton.jit
def rows_of(r, i, head, seq, sizes, interval, PACK: tl.constexpr):
    """Return the queries of a tile as index tensors (tile_q, 1). Without PACK all have the same head."""
    low, high = bounds(i, seq, interval)
    position = i.to(tl.int64) + seq.offset + seq.leftpad
    h = head
    if PACK:
        h = (head * sizes.group + r % sizes.group)[:, None]
    used = (i < seq.n_q)[:, None]
    return Rows(i[:, None], h, low[:, None], high[:, None], position[:, None], used)


@triton.jit
def start_row(heads, h, split, SPLIT: tl.constexpr, TILE_Q: tl.constexpr):
    """Return m and l before the first key. A sink is a score without a value, and only the first split counts it."""
    m = tl.full([TILE_Q], float("-inf"), tl.float32)
    if heads.sink is not None:
        m = tl.load(heads.sink + h) * LOG2E
        if SPLIT:
            m = tl.where(split == 0, m, float("-inf"))
    return m, tl.where(m > float("-inf"), 1.0, 0.0)


@triton.jit
def visit(
    start, m, l, acc0, acc1, q0, q1, k, v, row, seq, low, high, kv_head, bias, mask, heads, tables, sizes, scalars,
    dropout, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_K: tl.constexpr, EDGE: tl.constexpr, LOWER: tl.constexpr, HOLES: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys."""
    j = start + tl.arange(0, TILE_K)
    keys = (j >= low) & (j < high)  # outside this range, memory may hold NaN
    place_k, slot_k = slots(j, keys, seq, tables, sizes)
    k_rows = k.pointer + place_k * k.batch + slot_k * k.row + kv_head * k.head
    v_rows = v.pointer + place_k * v.batch + slot_k * v.row + kv_head * v.head
    s = tl.zeros([q0.shape[0], TILE_K], tl.float32)
    s = dot(q0, tl.trans(load_stored(k_rows, keys, q0.dtype, EDGE, 0, D0, HEAD_DIM)), s, PRECISION)
    if D1 > 0:
        s = dot(q1, tl.trans(load_stored(k_rows, keys, q0.dtype, EDGE, D0, D1, HEAD_DIM)), s, PRECISION)
    if k.scale is not None:
        s = s * scales(k, place_k, slot_k, kv_head, keys, seq)
    UNMASKED: tl.constexpr = mask is None and (scalars.mask is None or scalars.lists is not None)
    UNCHANGED: tl.constexpr = scalars.softcap is None and scalars.score is None
    PLAIN: tl.constexpr = UNMASKED and UNCHANGED and bias is None and heads.slopes is None
    if PLAIN and not EDGE and not NEGATIVE:
        m_new = tl.maximum(m, tl.max(s, 1) * (scalars.scale * LOG2E))
        finite = m_new
        p = tl.exp2(s * (scalars.scale * LOG2E) - m_new[:, None])
    else:
        t, _ = capped(s, scalars)
        x = scores(t, row, j[None, :], start, seq.index, bias, mask, heads, scalars, EDGE, LOWER)
        if HOLES and EDGE:
            keys = keys & (tl.max((x > float("-inf")).to(tl.int32), 0) > 0)
        m_new = tl.maximum(m, tl.max(x, 1))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(x - finite[:, None])
    rescale = tl.exp2(m - finite)
    l = l * rescale + tl.sum(p, 1)
    if dropout is not None:
        p = tl.where(kept(dropout, row, start, seq.index, sizes, TILE_K), p, 0.0)
    top = 1.0
    if v.scale is not None:
        p, top = weigh(p, scales(v, place_k, slot_k, kv_head, keys, seq), v, q0.dtype)
    p = narrow(p, q0.dtype)
    v0 = load_stored(v_rows, keys, q0.dtype, EDGE, 0, E0, HEAD_DIM_V)
    acc0 = add_product(p, v0, acc0 * rescale[:, None], v, top, PRECISION)
    if E1 > 0:
        v1 = load_stored(v_rows, keys, q0.dtype, EDGE, E0, E1, HEAD_DIM_V)
        acc1 = add_product(p, v1, acc1 * rescale[:, None], v, top, PRECISION)
    return m_new, l, acc0, acc1


@triton.jit
def finish(
    m, l, acc0, acc1, out, lse, b, row_q, i, h, used, owned, split, schedule, dropout, HEAD_DIM_V: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr,
):  # fmt: skip
    """Write out and lse. Unused queries get 0 and -inf. The parts of the splits are stored one after another."""
    some = used & (l != 0)  # NaN stays NaN
    factor = tl.where(some, 1.0 / tl.where(l != 0, l, 1.0), 0.0)
    if dropout is not None:
        factor = factor * dropout.factor
    row = (row_q + i).to(tl.int64)
    entry = b.to(tl.int64)
    out_rows = out.pointer + entry * out.batch + row * out.row + h.to(tl.int64) * out.head
    lse_rows = lse.pointer + entry * lse.batch + row * lse.row + h.to(tl.int64) * lse.head
    out_rows += split.to(tl.int64) * schedule.out_split
    lse_rows += split.to(tl.int64) * schedule.lse_split
    store(out_rows, tl.where(some[:, None], acc0 * factor[:, None], 0.0), owned, 0, E0, HEAD_DIM_V)
    if E1 > 0:
        store(out_rows, tl.where(some[:, None], acc1 * factor[:, None], 0.0), owned, E0, E1, HEAD_DIM_V)
    tl.store(lse_rows, tl.where(some, (m + tl.log2(l)) * LN2, float("-inf")), mask=owned)
