"""Lists of the tiles that mask_mod does not exclude, so that kernels visit only these.

A kernel evaluates mask_mod on every pair once per call, or once per sequence or head if the function depends on them.
For each tile of queries (or of keys) it lists the full tiles of keys (or of queries), and the mixed ones, in increasing
order:

    number of full tiles, number of mixed tiles, full tiles (list_tiles entries), mixed tiles (list_tiles entries)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Walk(NamedTuple):
    """Tiles that a program visits: [full, edge) without a mask, then the edges in three ranges.

    Edges are [begin, full), [edge, end) and [mixed, mixed_end). Without lists these are tiles. With lists they are
    positions of tiles after `base`.
    """

    begin: Any
    full: Any
    edge: Any
    end: Any
    mixed: Any
    mixed_end: Any
    base: Any


@triton.jit
def attention_mask_tiles(
    sizes, scalars, heads, tiles, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, PACK: tl.constexpr, BY_KEY: tl.constexpr
):
    """Write the list of one of `tiles` tiles of queries or, if BY_KEY, of keys, for one of `heads` heads."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    head, b = pair % heads, pair // heads
    packed = sizes.group if PACK else 1
    TILE: tl.constexpr = TILE_K if BY_KEY else TILE_Q
    OTHER: tl.constexpr = TILE_Q if BY_KEY else TILE_K
    r = tile * TILE + tl.arange(0, TILE)
    own = (r // packed)[:, None]
    h = head
    if PACK:
        h = (head * packed + r % packed)[:, None]
    used = own < (sizes.seqlen_k if BY_KEY else sizes.seqlen_q)
    size = sizes.seqlen_q if BY_KEY else sizes.seqlen_k
    row = pair.to(tl.int64) * tiles + tile
    start = scalars.lists + row * (2 * scalars.list_tiles + 2)
    full, mixed = tile * 0, tile * 0
    for t in range(0, scalars.list_tiles):
        other = (t * OTHER + tl.arange(0, OTHER))[None, :]
        query, key = (other, own) if BY_KEY else (own, other)
        seen = scalars.mask(b, h, query, key, scalars)
        inside = used & (other < size)
        some = tl.max((inside & seen).to(tl.int32)) > 0
        every = tl.min(((inside & seen) | (inside == 0)).to(tl.int32)) > 0
        if some:
            place = tl.where(every, full, scalars.list_tiles + mixed)
            tl.store(start + 2 + place, t)
            full += tl.where(every, 1, 0)
            mixed += tl.where(every, 0, 1)
    tl.store(start, full)
    tl.store(start + 1, mixed)


@triton.jit
def walk_tiles(begin, full, edge, end, b, head, tile, scalars):
    """Return the walk over the tiles of the interval, edges [begin, full) and [edge, end), that mask_mod leaves."""
    base, mixed, mixed_end = begin.to(tl.int64) * 0, begin * 0, begin * 0
    if scalars.lists is not None:
        row = b.to(tl.int64) * scalars.list_batch + head.to(tl.int64) * scalars.list_head + tile
        row = tl.minimum(row, scalars.list_count - 1)  # rows outside every sequence have no list
        base = row * (2 * scalars.list_tiles + 2)
        start = scalars.lists + base
        count, first = tl.load(start), 2 + scalars.list_tiles
        mixed_count = tl.load(start + 1)
        mixed = first + position(start + first, mixed_count, begin)
        mixed_end = first + position(start + first, mixed_count, end)
        begin = 2 + position(start + 2, count, begin)
        full = 2 + position(start + 2, count, full)
        edge = 2 + position(start + 2, count, edge)
        end = 2 + position(start + 2, count, end)
    return Walk(begin, full, edge, end, mixed, mixed_end, base)


@triton.jit
def position(tiles, count, tile):
    """Return the number of entries of an increasing list that are below `tile`."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(tiles + middle) < tile:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def count_edges(walk):
    return walk.full - walk.begin + walk.end - walk.edge + walk.mixed_end - walk.mixed


@triton.jit
def edge_tile(n, walk, scalars):
    """Return the n-th edge."""
    return listed_tile(edge_place(n, walk, scalars), walk, scalars)


@triton.jit
def edge_place(n, walk, scalars):
    """Return the position of the n-th edge."""
    before = walk.full - walk.begin
    place = tl.where(n < before, walk.begin + n, walk.edge + n - before)
    if scalars.lists is not None:
        after = before + walk.end - walk.edge
        place = tl.where(n < after, place, walk.mixed + n - after)
    return place


@triton.jit
def listed_tile(n, walk, scalars):
    """Return the tile at position n."""
    tile = n
    if scalars.lists is not None:
        tile = tl.load(scalars.lists + walk.base + n)
    return tile
