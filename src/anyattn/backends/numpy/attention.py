"""Attention tile by tile. At most one tile of the (seqlen_q, seqlen_k) scores is stored at a time.

Forward: a tile of queries visits the tiles of keys that it attends to. Each query keeps the largest score so far, the
sum of the exponentials relative to it, and the weighted sum of the values. When the maximum rises, the two sums are
rescaled:

    m' = max(m, max_j s_j)             l' = l exp(m - m') + sum_j exp(s_j - m')
    o = acc / l, lse = m + log l       acc' = acc exp(m - m') + sum_j exp(s_j - m') D_j v_j

A sink is a score without a value, so its queries start with m = sink, l = 1 instead of m = -inf, l = 0.

Backward: the probabilities are recomputed as P = exp(s - lse), which needs no maximum. If lse is so large that its
rounding error would affect P, the maximum and sum of the query are recomputed too, and P = exp(s - m) / l. With the
dropout factors D:

    delta = rowsum(dO O) - dlse        dP = D (dO V^T)               dS = P (dP - delta)
    dT = dS f'(t) (1 - (t / softcap)^2)      dQ = scale dT K               dK = scale dT^T Q
    dV = (P D)^T dO                    dbias = dS                    dsink = -sum P_sink delta

f' is the derivative of score_mod, 1 without it. Each tile of queries computes its own dQ. dK and dV are summed over
the tiles of queries, which takes O(seqlen_k) memory.
Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023), algorithms 1, 2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...definition import philox
from ...definition.dtypes import LOWEST_SCORE, widen
from .tiles import Arrays, Floats, Keys, Rows, Sum, key_tiles, place, row_tiles, score_tile

# Beyond this |lse|, P = exp(s - lse) has a relative error above 4e-6 in float32: half a unit in lse's last place.
TRUSTED_LSE = 128.0


class Scores(NamedTuple):
    """Scores (heads_kv, group, rows, keys), -inf for masked keys, and what their derivatives need.

    tanh: t / softcap, None without a softcap. t: the argument of score_mod, None without a score_mod.
    """

    s: Floats
    tanh: Floats | None
    t: Floats | None


def forward(arrays: Arrays) -> None:
    """Write out and lse."""
    arrays.view("out")[...] = 0  # queries outside every sequence
    arrays.view("lse")[...] = -np.inf
    for sequence in arrays.sequences():
        for rows in row_tiles(arrays.problem, sequence):
            _forward_rows(arrays, rows)


def _forward_rows(arrays: Arrays, rows: Rows) -> None:
    q = arrays.read_rows("q", rows)
    m, l = _begin(arrays, rows)
    acc = np.zeros((*rows.shape, arrays.problem.head_dim_v), arrays.kind)
    for keys in key_tiles(arrays, rows):
        p, m, l, rescale = _visit(arrays, rows, keys, q, m, l)
        if arrays.problem.dropout_threshold:
            p *= dropout(arrays, rows, keys)
        acc *= rescale[..., None]
        acc += unstack(stack(p) @ arrays.read_keys("v", rows, keys), rows)
    arrays.write_rows("out", rows, acc / np.where(l > 0, l, 1)[..., None])
    arrays.write_numbers("lse", rows, m + np.log(l))


def _begin(arrays: Arrays, rows: Rows) -> tuple[Floats, Floats]:
    """Return m and l before the first key."""
    m = np.full(rows.shape, -np.inf, arrays.kind)
    if arrays.problem.sink is not None:
        m[...] = arrays.of_heads("sink", rows)
    return m, (m > -np.inf).astype(arrays.kind)


def _visit(arrays: Arrays, rows: Rows, keys: Keys, q: Floats, m: Floats, l: Floats) -> tuple[Floats, ...]:
    """Return exp(s - m) of a tile, the new m and l, and the factor that rescales earlier sums."""
    s = scores(arrays, rows, keys, q, arrays.read_keys("k", rows, keys)).s
    m_new = np.maximum(m, s.max(axis=-1))
    finite = _finite(m_new)
    p = np.exp(np.subtract(s, finite[..., None], out=s), out=s)
    rescale = np.exp(m - finite)
    return p, m_new, l * rescale + p.sum(axis=-1), rescale


def backward(arrays: Arrays) -> None:
    """Write dq and, if the call has them, dk, dv, dbias and dsink."""
    arrays.view("dq")[...] = 0
    sums = {
        name: Sum(arrays, name) for name in ("dk", "dv", "dbias", "dsink", "dcaptured") if arrays.view(name) is not None
    }
    for sequence in arrays.sequences():
        for rows in row_tiles(arrays.problem, sequence):
            _backward_rows(arrays, rows, sums)
    for total in sums.values():
        total.finish()


def _backward_rows(arrays: Arrays, rows: Rows, sums: dict[str, Sum]) -> None:
    problem = arrays.problem
    q, do = arrays.read_rows("q", rows), arrays.read_rows("dout", rows)
    (base, rest), delta = normalizers(arrays, rows, q), output_delta(arrays, rows, do)
    dq = np.zeros_like(q)
    for keys in key_tiles(arrays, rows):
        k, v = arrays.read_keys("k", rows, keys), arrays.read_keys("v", rows, keys)
        s, tanh, t = scores(arrays, rows, keys, q, k)
        s -= base[..., None]
        p = np.exp(np.subtract(s, rest[..., None], out=s), out=s)
        dp = unstack(do @ transpose(v), rows)
        factors = dropout(arrays, rows, keys) if problem.dropout_threshold else None
        if factors is not None:
            dp *= factors
        if "dv" in sums:
            weights = p if factors is None else p * factors
            sums["dv"].add_keys(rows, keys, transpose(stack(weights)) @ do)
        dp -= delta[..., None]
        ds = np.multiply(p, dp, out=dp)
        if "dbias" in sums:
            sums["dbias"].add_scores(rows, keys, ds)
        if t is not None:
            captured = sums["dcaptured"].values if "dcaptured" in sums else None
            ds = arrays.functions.backward(t, place(rows, keys.start, keys.stop), ds, captured)
        if tanh is not None:
            ds *= 1 - tanh * tanh
        ds *= arrays.number(problem.scale)
        dt = stack(ds)
        dq += dt @ k
        if "dk" in sums:
            sums["dk"].add_keys(rows, keys, transpose(dt) @ q)
    arrays.write_rows("dq", rows, dq)
    if "dsink" in sums:
        sink = arrays.of_heads("sink", rows)
        weight = np.where(sink > -np.inf, np.exp(sink - base - rest), 0)
        sums["dsink"].values[rows.heads] -= (weight * delta).sum(axis=-1).reshape(-1)


def normalizers(arrays: Arrays, rows: Rows, q: Floats) -> tuple[Floats, Floats]:
    """Return (base, rest) of each query, P = exp(s - base - rest): (lse, 0), or (m, log l) if |lse| is large.

    An lse that exceeds the query's own lse by more than rounding belongs to a larger set of keys, so it is used
    unchanged.
    """
    lse = arrays.read_numbers("lse", rows)
    base, rest = _finite(lse), np.zeros_like(lse)
    size = np.abs(base)
    large = size > TRUSTED_LSE
    if not large.any():
        return base, rest
    m, l = _begin(arrays, rows)
    for keys in key_tiles(arrays, rows):
        _, m, l, _ = _visit(arrays, rows, keys, q, m, l)
    log_l = np.log(np.where(l > 0, l, 1))
    rounding = 2 * np.finfo(arrays.kind).eps * size
    own = large & (l > 0) & (m.astype(np.float64) + log_l >= lse.astype(np.float64) - rounding)
    return np.where(own, m, base), np.where(own, log_l, rest)


def output_delta(arrays: Arrays, rows: Rows, do: Floats) -> Floats:
    """(heads_kv, group, rows)"""
    delta: Floats = (do * arrays.read_rows("out", rows)).sum(axis=-1).reshape(rows.shape)
    return delta if arrays.view("dlse") is None else delta - arrays.read_numbers("dlse", rows)


def scores(arrays: Arrays, rows: Rows, keys: Keys, q: Floats, k: Floats) -> Scores:
    """Return s of a tile. The mask of positions is applied only if an edge of the mask crosses the tile."""
    problem = arrays.problem
    s = unstack(q @ transpose(k), rows)
    s *= arrays.number(problem.scale)
    tanh = None
    if problem.softcap > 0:
        tanh = np.tanh(s / arrays.number(problem.softcap))
        s = tanh * arrays.number(problem.softcap)
    t = None if arrays.functions.graph.score is None else s
    if t is not None:
        s = arrays.functions.score(t, place(rows, keys.start, keys.stop)).copy()
    if problem.bias is not None:
        s += widen(score_tile(arrays.view("bias"), rows, keys), problem.bias.dtype, arrays.kind)
    if problem.alibi_slopes is not None:
        c = np.arange(keys.start, keys.stop) - rows.sequence.leftpad
        distance = np.abs(rows.sequence.positions(rows.start, rows.stop)[:, None] - c).astype(arrays.kind)
        s -= arrays.of_heads("alibi_slopes", rows)[..., None] * distance
    lowest = LOWEST_SCORE[problem.compute_dtype]
    if s.min(initial=0.0) < lowest:
        np.copyto(s, -np.inf, where=s < lowest)
    if keys.visible is not None:
        np.copyto(s, -np.inf, where=~keys.visible)
    if problem.mask is not None:
        np.copyto(s, -np.inf, where=~score_tile(arrays.view("mask"), rows, keys))
    return Scores(s, tanh, t)


def dropout(arrays: Arrays, rows: Rows, keys: Keys) -> Floats:
    """Return D of a tile: 0 or 1 / (1 - p)."""
    problem = arrays.problem
    state, b = arrays.view("rng_state"), rows.sequence.number
    queries = np.arange(rows.start, rows.stop) + problem.query_start
    slots = np.arange(keys.start, keys.stop) + problem.key_start
    factors = np.empty((*rows.shape, len(slots)), arrays.kind)
    for tile, h in zip(factors.reshape(-1, *factors.shape[2:]), range(rows.heads.start, rows.heads.stop), strict=True):
        tile[...] = philox.keep(state, problem.dropout_p, b * problem.nheads + h, queries, slots)
    factors *= arrays.number(philox.keep_scale(problem.dropout_p))
    return factors


def stack(tile: Floats) -> Floats:
    """Reshape (heads_kv, group, rows, n) to (heads_kv, group * rows, n)."""
    heads_kv, group, rows, n = tile.shape
    return tile.reshape(heads_kv, group * rows, n)


def unstack(tile: Floats, rows: Rows) -> Floats:
    """Reshape (heads_kv, group * rows, n) to (heads_kv, group, rows, n)."""
    return tile.reshape(*rows.shape, tile.shape[-1])


def transpose(tile: Floats) -> Floats:
    return np.asarray(tile.swapaxes(-1, -2))


def _finite(x: Floats) -> Floats:
    """Replace -inf by 0, so that queries without visible keys subtract 0."""
    return np.asarray(np.where(x == -np.inf, x.dtype.type(0), x))
