"""Derivatives of attention along tangents, tile by tile: the tangent of (out, lse), and the gradients of that tangent.

`definition/derivatives.py` has the formulas. P comes from the saved lse, so that one sweep over the key tiles gives a
tangent: a tile of queries stores the sums over keys of P u and of P D (u v + tv). The second pass needs the tangent of
a query before it can use any of the query's keys, so it sweeps twice. dK and dV are sums over the tiles of queries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...definition.dtypes import widen
from .attention import dropout, normalizers, output_delta, scores, stack, transpose, unstack
from .tiles import Arrays, Floats, Keys, Rows, Sum, key_tiles, place, row_tiles, score_tile


class Queries(NamedTuple):
    """Tile of queries, (heads_kv, group * rows, head_dim), its tangent, and base and rest of P."""

    q: Floats
    tq: Floats | None
    base: Floats
    rest: Floats


class Derivatives(NamedTuple):
    """Tile of keys: P, dropout factors D (None without), x, u, and the tiles of k, v, tk and tv.

    tanh and t: see `Scores`.
    """

    p: Floats
    d: Floats | None
    x: Floats
    tanh: Floats | None
    t: Floats | None
    u: Floats
    k: Floats
    v: Floats
    tk: Floats | None
    tv: Floats | None


def tangent(arrays: Arrays) -> None:
    """Write tout and tlse."""
    arrays.view("tout")[...] = 0  # queries outside every sequence
    arrays.view("tlse")[...] = 0
    for sequence in arrays.sequences():
        for rows in row_tiles(arrays.problem, sequence):
            out, lse = _tangent_rows(arrays, rows, _queries(arrays, rows))
            arrays.write_rows("tout", rows, out)
            arrays.write_numbers("tlse", rows, lse)


def second(arrays: Arrays) -> None:
    """Write the gradients of <dout, tout> + <dlse, tlse>."""
    for name in ("dq", "ddout", "ddlse"):
        arrays.view(name)[...] = 0
    names = ("dk", "dv", "dbias", "dsink", "dcaptured")
    sums = {name: Sum(arrays, name) for name in names if arrays.view(name) is not None}
    for sequence in arrays.sequences():
        for rows in row_tiles(arrays.problem, sequence):
            _second_rows(arrays, rows, sums)
    for total in sums.values():
        total.finish()


def _queries(arrays: Arrays, rows: Rows) -> Queries:
    q = arrays.read_rows("q", rows)
    tq = None if arrays.view("tq") is None else arrays.read_rows("tq", rows)
    return Queries(q, tq, *normalizers(arrays, rows, q))


def _tangent_rows(arrays: Arrays, rows: Rows, queries: Queries) -> tuple[Floats, Floats]:
    """Return tout (heads_kv, group, rows, head_dim_v) and tlse (heads_kv, group, rows) of a tile of queries."""
    lse = np.zeros(rows.shape, arrays.kind)
    out = np.zeros((rows.shape[0], rows.shape[1] * rows.shape[2], arrays.problem.head_dim_v), arrays.kind)
    for keys in key_tiles(arrays, rows):
        tile = _derivatives(arrays, rows, keys, queries)
        weighted = tile.p * tile.u
        lse += weighted.sum(axis=-1)
        if tile.d is not None:
            weighted *= tile.d
        out += stack(weighted) @ tile.v
        if tile.tv is not None:
            out += stack(tile.p if tile.d is None else tile.p * tile.d) @ tile.tv
    if arrays.view("tsink") is not None:
        lse += _sink_weight(arrays, rows, queries) * arrays.of_heads("tsink", rows)
    result = unstack(out, rows)
    result -= lse[..., None] * unstack(arrays.read_rows("out", rows), rows)
    return result, lse


def _second_rows(arrays: Arrays, rows: Rows, sums: dict[str, Sum]) -> None:
    scale = arrays.number(arrays.problem.scale)
    queries = _queries(arrays, rows)
    tout, tlse = _tangent_rows(arrays, rows, queries)
    arrays.write_rows("ddout", rows, tout)
    arrays.write_numbers("ddlse", rows, tlse)
    do = arrays.read_rows("dout", rows)
    delta, g = output_delta(arrays, rows, do), (unstack(do, rows) * tout).sum(axis=-1)
    dq = np.zeros_like(queries.q)
    for keys in key_tiles(arrays, rows):
        tile = _derivatives(arrays, rows, keys, queries)
        dropped = tile.p if tile.d is None else tile.p * tile.d
        centred = tile.u - tlse[..., None]
        sums["dv"].add_keys(rows, keys, transpose(stack(dropped * centred)) @ do)
        dp = _product(do, tile.v, rows, tile.d) - delta[..., None]
        ds = tile.p * dp
        ds2 = centred * dp - g[..., None]
        if tile.tv is not None:
            ds2 += _product(do, tile.tv, rows, tile.d)
        ds2 *= tile.p
        if "dbias" in sums:
            sums["dbias"].add_scores(rows, keys, ds2)
        captured = sums["dcaptured"].values if "dcaptured" in sums else None
        dt, dt2 = (stack(x) * scale for x in _of_products(arrays, rows, keys, tile, ds, ds2, captured))
        dq += dt2 @ tile.k
        dk = transpose(dt2) @ queries.q
        if tile.tk is not None:
            dq += dt @ tile.tk
        if queries.tq is not None:
            dk += transpose(dt) @ queries.tq
        sums["dk"].add_keys(rows, keys, dk)
    arrays.write_rows("dq", rows, dq)
    if "dsink" in sums:
        ts = arrays.of_heads("tsink", rows) if arrays.view("tsink") is not None else arrays.number(0)
        terms = _sink_weight(arrays, rows, queries) * ((ts - tlse) * delta + g)
        sums["dsink"].values[rows.heads] -= terms.sum(axis=-1).reshape(-1)


def _of_products(
    arrays: Arrays, rows: Rows, keys: Keys, tile: Derivatives, ds: Floats, ds2: Floats, captured: Floats | None
) -> tuple[Floats, Floats]:
    """Return dt = f' ds and dt' = f' ds' + f'' x ds. Add the gradients of captured arrays to `captured`, if given."""
    by_cap = None if tile.tanh is None else 1 - tile.tanh * tile.tanh
    if tile.t is not None:
        functions, where = arrays.functions, place(rows, keys.start, keys.stop)
        x = tile.x if by_cap is None else by_cap * tile.x
        ds2 = functions.backward(tile.t, where, ds2, captured)
        ds2 = ds2 + functions.slope.backward(tile.t, where, x * ds, captured)
        ds = functions.backward(tile.t, where, ds, None)
    if by_cap is not None and tile.tanh is not None:
        curvature = -2 / arrays.number(arrays.problem.softcap) * tile.tanh * by_cap
        ds, ds2 = by_cap * ds, by_cap * ds2 + curvature * tile.x * ds
    return ds, ds2


def _derivatives(arrays: Arrays, rows: Rows, keys: Keys, queries: Queries) -> Derivatives:
    """Compute P and the derivatives of the scores of a tile."""
    problem = arrays.problem
    k, v = arrays.read_keys("k", rows, keys), arrays.read_keys("v", rows, keys)
    tk, tv = (None if arrays.view(name) is None else arrays.read_keys(name, rows, keys) for name in ("tk", "tv"))
    s, tanh, t = scores(arrays, rows, keys, queries.q, k)
    s -= queries.base[..., None]
    p = np.exp(np.subtract(s, queries.rest[..., None], out=s), out=s)
    x = np.zeros_like(p)
    if queries.tq is not None:
        x += unstack(queries.tq @ transpose(k), rows)
    if tk is not None:
        x += unstack(queries.q @ transpose(tk), rows)
    x *= arrays.number(problem.scale)
    u = x if tanh is None else (1 - tanh * tanh) * x
    if t is not None:
        u = arrays.functions.backward(t, place(rows, keys.start, keys.stop), u, None)
    if arrays.view("tbias") is not None:
        assert problem.bias is not None
        u = u + widen(score_tile(arrays.view("tbias"), rows, keys), problem.bias.dtype, arrays.kind)
    if not np.isfinite(u).all():
        u = np.where(p > 0, u, 0)  # a masked score has no derivative: never 0 * inf
    return Derivatives(
        p, dropout(arrays, rows, keys) if problem.dropout_threshold else None, x, tanh, t, u, k, v, tk, tv
    )


def _product(do: Floats, v: Floats, rows: Rows, d: Floats | None) -> Floats:
    """Return D <do, v> of a tile."""
    found = unstack(do @ transpose(v), rows)
    return found if d is None else found * d


def _sink_weight(arrays: Arrays, rows: Rows, queries: Queries) -> Floats:
    """Return the sink's probability for each query."""
    sink = arrays.of_heads("sink", rows)
    weight: Floats = np.where(sink > -np.inf, np.exp(sink - queries.base - queries.rest), arrays.number(0))
    return weight
