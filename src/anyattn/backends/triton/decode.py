"""Decoding, with few queries and many keys.

The heads of a group share a tile, programs split the keys (split-KV), and
their partial results are combined.

lse = log(sum_s exp(lse_s))      out = sum_s exp(lse_s - lse) out_s
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LN2, LOG2E, load, store


@triton.jit
def combine_splits(
    part_out, part_lse, out, lse, rows, nheads, seqlen_q, splits,
    HEAD_DIM_V: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Combine float32 parts to out, `rows` rows (batch, seqlen_q, nheads), and lse (batch, nheads, seqlen_q)."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = n < rows
    n = n.to(tl.int64)
    row, h = n // nheads, n % nheads
    place = (row // seqlen_q * nheads + h) * seqlen_q + row % seqlen_q
    m = tl.full([TILE], float("-inf"), tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc0 = tl.zeros([TILE, E0], tl.float32)
    acc1 = tl.zeros([TILE, E1 if E1 > 0 else 1], tl.float32)
    lses, parts = part_lse + place, part_out + n * HEAD_DIM_V
    step = rows.to(tl.int64)
    for _ in range(0, splits):
        x = tl.load(lses, mask=inside, other=float("-inf")) * LOG2E
        m_new = tl.maximum(m, x)
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        rescale, weight = tl.exp2(m - finite), tl.exp2(x - finite)
        l = l * rescale + weight
        acc0 = acc0 * rescale[:, None] + weight[:, None] * load(parts, inside, True, 0, E0, HEAD_DIM_V)
        if E1 > 0:
            acc1 = acc1 * rescale[:, None] + weight[:, None] * load(parts, inside, True, E0, E1, HEAD_DIM_V)
        m, lses, parts = m_new, lses + step, parts + step * HEAD_DIM_V
    factor = 1.0 / tl.where(l != 0, l, 1.0)
    outs = out + n * HEAD_DIM_V
    store(outs, acc0 * factor[:, None], inside, 0, E0, HEAD_DIM_V)
    if E1 > 0:
        store(outs, acc1 * factor[:, None], inside, E0, E1, HEAD_DIM_V)
    tl.store(lse + place, tl.where(l != 0, (m + tl.log2(l)) * LN2, float("-inf")), mask=inside)
