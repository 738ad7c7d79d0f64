"""Gradients of captured arrays: for every read, the sum of dS times its derivative over the pairs that read an element.

Programs visit tiles of scores as in backward.py, and several of them add to one element. So that the order of the
additions does not matter, terms are rounded to multiples of a quantum and added as 64-bit integers. The quantum is a
power of two: the largest term of an array, which a first pass finds, times a bound on the number of terms, over 2^62.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import Terms, load_query_tile, tile_gradient
from .forward import place
from .tile_lists import count_edges, edge_place, listed_tile, walk_tiles
from .tiles import INTERPRETED, capped, is_visible, key_tiles, sequence

POSITIVE, NEGATIVE, UNDEFINED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # infinite terms, and NaN


class Sums(NamedTuple):
    """Sums of terms: the largest term of each array (bits of float32), then integers and flags of each element.

    log_terms: binary logarithm of a bound on the number of terms, rounded up.
    """

    largest: Any
    integers: Any
    flags: Any
    result: Any
    log_terms: Any


@triton.jit
def attention_backward_dcaptured(
    q, k, v, dout, lse, delta, bias, mask, heads, tables, sizes, interval, scalars, dropout, schedule, sums,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TOP_LEFT: tl.constexpr, LOWER: tl.constexpr,
    HOLES: tl.constexpr, PRECISION: tl.constexpr, LAST_FIRST: tl.constexpr, ADD: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """Add the terms of a tile of queries; with MEASURE, only find the largest term. ADD: see score_source.py."""
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
    walk = walk_tiles(begin, full, edge, end, b, head, tile, scalars)
    inner = walk.edge - walk.full
    for n in range(0, inner + count_edges(walk)):
        at = tl.where(n < inner, walk.full + n, edge_place(n - inner, walk, scalars))
        start = listed_tile(at, walk, scalars) * TILE_K
        ds, _slope, _k0, _k1, s, _scales = tile_gradient(
            start, own, k, v, low, high, seq, interval, Terms(bias, mask, heads, sizes, scalars, dropout),
            HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, TILE_K, True, LOWER, HOLES, PRECISION,
        )  # fmt: skip
        score, _slope = capped(s, scalars)
        j = (start + tl.arange(0, TILE_K))[None, :]
        ds = tl.where(is_visible(own.row, j, True, LOWER), ds, 0.0)  # dP may be infinite
        ADD(ds, score, b, head, own.row.index, j, scalars, sums, MEASURE)


@triton.jit
def add_terms(
    term, index, array: tl.constexpr, sums, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr, MEASURE: tl.constexpr
):
    """Add the terms (tile_q, tile_k) of one read to elements `index`; -1: to none.

    The terms of the axes on which the index does not depend are summed first.
    """
    if not BY_QUERY:
        term = tl.sum(term, 0, keep_dims=True)
        if INTERPRETED:  # score_math.spread has made a tensor of the index
            index = tl.max(index, 0, keep_dims=True)
    if not BY_KEY:
        term = tl.sum(term, 1, keep_dims=True)
        if INTERPRETED:
            index = tl.max(index, 1, keep_dims=True)
    index = tl.broadcast_to(index, term.shape)
    size = tl.abs(term)
    finite = size < float("inf")
    largest = sums.largest + array
    if MEASURE:
        found = tl.max(tl.where(finite & (index >= 0), size, 0.0))
        tl.atomic_max(largest, found.to(tl.int32, bitcast=True), sem="relaxed")
    else:
        scaled = term.to(tl.float64) * quantum(tl.load(largest), sums.log_terms, -1)
        number = tl.floor(tl.where(finite, scaled, 0.0) + 0.5).to(tl.int64)
        tl.atomic_add(sums.integers + index, number, mask=(index >= 0) & (number != 0), sem="relaxed")
        flag = tl.where(term == float("inf"), POSITIVE, tl.where(term == float("-inf"), NEGATIVE, UNDEFINED))
        tl.atomic_or(sums.flags + index, flag, mask=(index >= 0) & (finite == 0), sem="relaxed")


@triton.jit
def quantum(bits, log_terms, sign: tl.constexpr):
    """Return the quantum for a largest term with these bits, as float64; its inverse for sign = -1."""
    exponent = (bits >> 23) - 126 + log_terms - 62  # the largest term is below 2^(exponent of its bits - 126)
    return ((1023 + sign * exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def finish_dcaptured(sums, array, start, size, TILE: tl.constexpr):
    """Write the gradients of one array: elements start, start + 1, ... of all."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = n < size
    e = start + n
    unit = quantum(tl.load(sums.largest + array), sums.log_terms, 1)
    total = (tl.load(sums.integers + e, mask=inside, other=0).to(tl.float64) * unit).to(tl.float32)
    flags = tl.load(sums.flags + e, mask=inside, other=0)
    total = tl.where(flags == POSITIVE, float("inf"), total)
    total = tl.where(flags == NEGATIVE, float("-inf"), total)
    total = tl.where(flags > NEGATIVE, float("nan"), total)
    tl.store(sums.result + e, total, mask=inside)


@triton.jit
def clear_dcaptured(sums, words, TILE: tl.constexpr):
    """Set the sums to 0: `words` integers of 32 bits, which start with the largest terms."""
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(sums.largest + n, tl.zeros([TILE], tl.int32), mask=n < words)
