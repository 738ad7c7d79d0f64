"""Device functions shared by all kernels: positions of queries and keys, their mask and their scores.

Index tensors have two dimensions: queries (tile_q, 1) and keys (1, tile_k), or transposed. One function therefore
serves tiles of scores in both orientations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

# The interpreter stores bfloat16 as integers. It multiplies those integers, and truncates where hardware rounds.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Sequence(NamedTuple):
    """Sequence: rows of memory, queries and keys in use, first key slot in use, position of query 0."""

    index: Any
    rows: Any
    n_q: Any
    n_k: Any
    leftpad: Any
    offset: Any
    row_q: Any  # first row in packed q
    row_k: Any  # first row in packed k and v
    entry_k: Any  # batch entry of dense k and v


class Rows(NamedTuple):
    """Queries of a tile: index in the sequence, query head, interval of keys, position relative to key 0, in use."""

    index: Any
    head: Any
    low: Any
    high: Any
    position: Any
    used: Any


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round to dtype, nearest and ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x != x, x, rounded)  # noqa: PLR0124 (NaN)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """Compute tanh with a relative error of a few ulp; by a polynomial near 0, where the formula cancels."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    y = x * x
    near = x + x * y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    return tl.where(y < 0.0625, near, far)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def entry(table, b, sizes, default):
    """Return table[b], or the default without a table."""
    value = default
    if table is not None:
        value = tl.load(table + b, mask=b < sizes.batch, other=0)
    return value


@triton.jit
def first_row(v, tables, sizes):
    """Return the first row of virtual sequence v: 0 precedes the first sequence, and batch + 1 follows the last one."""
    inside = (v > 0) & (v < sizes.batch + 2)
    start = tl.load(tables.cu_seqlens_q + v - 1, mask=inside, other=0)
    return clamp(tl.where(v < sizes.batch + 2, start, sizes.rows_q), 0, sizes.rows_q)


@triton.jit
def find(slot, tables, sizes, PACK: tl.constexpr, TILE: tl.constexpr):
    """Return (tile, sequence, its first row, its rows) of a slot of packed rows.

    Rows outside every sequence belong to sequence `batch`.

    Virtual sequence v owns the slots from first_row(v) // TILE + v on. They suffice for its rows at any length, so
    neither the longest length nor a prefix sum of tiles is needed.
    """
    rows_per_row = sizes.group if PACK else 1
    low = slot * 0
    high = low + sizes.batch + 1
    while low < high:
        middle = (low + high + 1) // 2
        if first_row(middle, tables, sizes) * rows_per_row // TILE + middle <= slot:
            low = middle
        else:
            high = middle - 1
    first = first_row(low, tables, sizes)
    b = tl.where((low > 0) & (low <= sizes.batch), low - 1, sizes.batch)
    return slot - (first * rows_per_row // TILE + low), b, first, first_row(low + 1, tables, sizes) - first


@triton.jit
def sequence(b, row_q, rows, tables, sizes, TOP_LEFT: tl.constexpr):
    """Read a sequence from the tables, clamped to the allocated memory. b = batch means rows outside every sequence."""
    n_q = clamp(entry(tables.seqused_q, b, sizes, rows), 0, rows)
    n_q = tl.where(b < sizes.batch, n_q, 0)
    row_k = b * 0
    length = row_k + sizes.seqlen_k
    if tables.cu_seqlens_k is not None:
        row_k = clamp(entry(tables.cu_seqlens_k, b, sizes, b), 0, sizes.rows_k)
        stop = tl.load(tables.cu_seqlens_k + b + 1, mask=b < sizes.batch, other=0)
        length = clamp(stop, row_k, sizes.rows_k) - row_k
    n_k = clamp(entry(tables.seqused_k, b, sizes, length), 0, length)
    leftpad = clamp(entry(tables.leftpad_k, b, sizes, b * 0), 0, n_k)
    if tables.offset is not None:
        offset = entry(tables.offset, b, sizes, b).to(tl.int64)
    elif TOP_LEFT:
        offset = (b * 0).to(tl.int64)
    else:
        offset = (n_k - leftpad - n_q).to(tl.int64)
    entry_k = clamp(entry(tables.cache_batch_idx, b, sizes, b), 0, sizes.entries_k - 1)
    return Sequence(b, rows, n_q, n_k, leftpad, offset, row_q, row_k, entry_k.to(tl.int64))


@triton.jit
def bounds(i, seq, interval):
    """Return the first and one-past-last visible key slot of queries i.

    Neither decreases. 64-bit, as positions may be.
    """
    p = i.to(tl.int64) + seq.offset
    keys = (seq.n_k - seq.leftpad).to(tl.int64)
    low = p * 0
    high = low + keys
    if interval.left is not None:
        low = tl.maximum(low, p - interval.left)
    if interval.right is not None:
        high = tl.minimum(high, p + interval.right + 1)
    if interval.chunk is not None:
        chunk = interval.chunk.to(tl.int64)
        start = p - (p % chunk + chunk) % chunk  # rounds down for either sign of %
        low = tl.maximum(low, start)
        high = tl.minimum(high, start + chunk)
    low, high = tl.minimum(low, keys), tl.maximum(high, 0)
    return seq.leftpad + low.to(tl.int32), seq.leftpad + high.to(tl.int32)


@triton.jit
def key_tiles(first, last, seq, interval, split, splits, TILE: tl.constexpr):
    """Return key tiles for queries first..last: edges [begin, full), full tiles [full, edge), edges [edge, end)."""
    low_first, high_first = bounds(first, seq, interval)
    low_last, high_last = bounds(last, seq, interval)
    begin = low_first // TILE
    end = tl.maximum(tl.cdiv(high_last, TILE), begin)
    end = tl.where(last < first, begin, end)
    share = tl.cdiv(end - begin, splits)
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)
    full = clamp(tl.cdiv(low_last, TILE), begin, end)
    edge = clamp(high_first // TILE, full, end)
    return begin, full, edge, end, low_first, high_last


@triton.jit
def slots(j, keys_used, seq, tables, sizes):
    """Return (entry, row) of key slots j in k and v. Page numbers are clamped to the allocated pages."""
    if tables.block_table is not None:
        pages = tables.block_table + seq.index.to(tl.int64) * tables.max_pages
        page = tl.load(pages + j // sizes.page_size, mask=keys_used, other=0)
        place, row = clamp(page, 0, sizes.entries_k - 1).to(tl.int64), (j % sizes.page_size).to(tl.int64)
    else:
        place, row = seq.entry_k, seq.row_k.to(tl.int64) + j
    return place, row


@triton.jit
def load(pointers, keep, MASKED: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Load (n, WIDTH) values of dimensions START...

    of n rows; 0 beyond SIZE and, if MASKED, for rows outside `keep` (n,).
    """
    d = START + tl.arange(0, WIDTH)
    addresses = pointers[:, None] + d[None, :]
    if START + WIDTH > SIZE:
        inside = (d < SIZE)[None, :]
        if MASKED:
            inside = inside & keep[:, None]
        values = tl.load(addresses, mask=inside, other=0.0)
    elif MASKED:
        values = tl.load(addresses, mask=keep[:, None], other=0.0)
    else:
        values = tl.load(addresses)
    return values


@triton.jit
def store(pointers, values, keep, START: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Store results like `load`, rounded to their dtype."""
    d = START + tl.arange(0, WIDTH)
    inside = keep[:, None]
    if START + WIDTH > SIZE:
        inside = inside & (d < SIZE)[None, :]
    tl.store(pointers[:, None] + d[None, :], narrow(values, pointers.dtype.element_ty), mask=inside)


@triton.jit
def is_visible(row, j, EDGE: tl.constexpr, LOWER: tl.constexpr):
    """Return the entries of an edge tile that the interval makes visible."""
    keep = row.used & (j < row.high)
    if LOWER:
        keep = keep & (j >= row.low)
    return keep


@triton.jit
def capped(s, scalars):
    """Return t, the scaled and capped products, and 1 - (t / softcap)^2, the derivative of the softcap."""
    t = s * scalars.scale
    slope = 1.0
    if scalars.softcap is not None:
        ratio = tanh(t / scalars.softcap)
        t, slope = ratio * scalars.softcap, 1.0 - ratio * ratio
    return t, slope


@triton.jit
def scores(t, row, j, start, b, bias, mask, heads, scalars, EDGE: tl.constexpr, LOWER: tl.constexpr):
    """Return scores times log2(e), -inf for masked keys. t: scaled and capped products; start: a key at most j."""
    keep = row.used
    if EDGE:
        keep = is_visible(row, j, EDGE, LOWER)
    if scalars.score is not None:
        t = scalars.score(t, b, row.head, row.index, j, scalars)
    if bias is not None:
        t += tl.load(dense(bias, b, row, j), mask=keep, other=0.0).to(tl.float32)
    if heads.slopes is not None:
        slope = tl.load(heads.slopes + b * heads.slopes_batch + row.head)
        distance = (row.position - start).to(tl.float32) - (j - start).to(tl.float32)
        t -= slope * tl.abs(distance)
    x = t * LOG2E
    if EDGE or scalars.score is not None:
        x = tl.where(keep, x, float("-inf"))
    if scalars.mask is not None and (EDGE or scalars.lists is None):
        x = tl.where(scalars.mask(b, row.head, row.index, j, scalars), x, float("-inf"))
    if mask is not None:
        x = tl.where(tl.load(dense(mask, b, row, j), mask=keep, other=0) != 0, x, float("-inf"))
    return x


@triton.jit
def dense(array, b, row, j):
    """Return the addresses of a tile of a bias or mask."""
    base = array.pointer + b.to(tl.int64) * array.batch
    return base + row.head.to(tl.int64) * array.head + row.index.to(tl.int64) * array.row + j.to(tl.int64) * array.key


@triton.jit
def kept(dropout, row, start, b, sizes, TILE_K: tl.constexpr):
    """Return the entries (tile_q, TILE_K) that dropout keeps. row: (tile_q, 1); start: a multiple of 8."""
    state = tl.load(dropout.state).to(tl.uint64, bitcast=True)
    offset = (tl.load(dropout.state + 1) & 0xFFFFFFFF).to(tl.uint32)
    octet = (start // 8 + tl.arange(0, TILE_K // 8))[None, :].to(tl.uint32)
    query = row.index.to(tl.uint32)
    zero = (query * 0) + (octet * 0)
    head = (b * sizes.nheads + row.head).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(state, zero + octet, zero + query, zero + head, zero + offset, n_rounds=7)
    # (tile_q, octets) words -> (..., high bit of the word's number, its low bit, half) -> keys in order
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    halves = tl.reshape(tl.join(low, high), [zero.shape[0], TILE_K])
    return halves >= dropout.threshold.to(tl.uint32)
