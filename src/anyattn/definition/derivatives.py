"""The definition of derivatives of attention along a direction, in NumPy float64: tangents, and gradients of tangents.

With tangents tq, tk, tv, tbias, tsink, where f' and f'' are the derivatives of softcap and score_mod together by the
product scale <q_i, k_j> (1 and 0 without both):

    x_ij = scale (<tq_i, k_j> + <q_i, tk_j>)         u_ij = f'_ij x_ij + tbias_ij
    tlse_i = sum_j P_ij u_ij + P_sink tsink          tout_i = sum_j P_ij D_ij (u_ij v_j + tv_j) - tlse_i o_i

`second` gives the gradients of <dout, tout> + <dlse, tlse>. They are the derivative of the backward along the tangents
too, because second derivatives are symmetric. With w = D <do, v>, e = D <do, tv>, delta = <do, o> - dlse and
g = <do, tout>:

    ds = P (w - delta)                               ds' = P ((u - tlse) (w - delta) + e - g)
    dt' = f' ds' + f'' x ds                          dv' = sum_i P D (u - tlse) do_i
    dq' = scale sum_j (dt' k_j + f' ds tk_j)         dk' = scale sum_i (dt' q_i + f' ds tq_i)
    dbias' = ds'                                     dsink' = -sum_i P_sink ((tsink - tlse) delta + g)
    dc' = sum_ij (ds' a_ij + ds a'_ij y'_ij x_ij)

In the last line, c is an array that score_mod reads, a the derivative of score_mod by c, a' the derivative of a by the
score, and y' the derivative of the softcap. The gradient of dout is tout, and the gradient of dlse is tlse. Derived
from the formulas of `reference.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .problem import Problem
from .reference import (
    Arrays,
    Float,
    Head,
    add_gradients,
    gradient_shapes,
    heads,
    rows_lse,
    score_tile,
)
from .score.evaluate import Functions


class Direction(NamedTuple):
    """Tangents of one head, in float64: zeros if a tangent is absent or a key is not used."""

    q: Float  # (n_q, head_dim)
    k: Float  # (n_k, head_dim)
    v: Float
    bias: Float | float  # (n_q or 1, n_k or 1)
    sink: float


class Tangent(NamedTuple):
    """Tangent of one head along a direction."""

    x: Float  # (n_q, n_k): derivative of the scores before the softcap
    u: Float  # derivative of the scores; 0 where masked
    out: Float
    lse: Float


def tangent(problem: Problem, arrays: Arrays, tangents: Arrays) -> tuple[Float, Float]:
    """Return (tout, tlse) in float64; 0 for queries outside every sequence. tangents: float64 arrays by name."""
    out, lse = np.zeros(problem.out_shape), np.zeros(problem.lse_shape)
    for head in heads(problem, arrays):
        found = head_tangent(problem, head, direction(head, tangents))
        out[head.rows_q] = found.out
        lse[rows_lse(problem, head)] = found.lse
    return out, lse


def second(problem: Problem, arrays: Arrays, dout: Float, dlse: Float | None, tangents: Arrays) -> dict[str, Float]:
    """Return the arrays of `SecondGradients` that the problem has, in float64."""
    grads = {name: np.zeros(shape) for name, shape in gradient_shapes(problem).items()}
    ddout, ddlse = np.zeros(problem.out_shape), np.zeros(problem.lse_shape)
    for head in heads(problem, arrays):
        dl = np.zeros_like(head.lse) if dlse is None else dlse[rows_lse(problem, head)]
        along = direction(head, tangents)
        found = head_tangent(problem, head, along)
        ddout[head.rows_q], ddlse[rows_lse(problem, head)] = found.out, found.lse
        add_gradients(grads, head, head_second(problem, head, along, found, dout[head.rows_q], dl))
    return {**grads, "ddout": ddout, "ddlse": ddlse}


def direction(head: Head, tangents: Arrays) -> Direction:
    """Return the tangents of one head."""

    def read(name: str, rows: tuple[Any, ...], like: Float) -> Float:
        given = tangents.get(name)
        return np.zeros_like(like) if given is None else np.asarray(given[rows], np.float64)

    tk, tv = (read(name, head.rows_k, like) for name, like in (("tk", head.k), ("tv", head.v)))
    used = head.used[:, None]
    bias, sink = tangents.get("tbias"), tangents.get("tsink")
    return Direction(
        read("tq", head.rows_q, head.q),
        np.where(used, tk, 0.0),
        np.where(used, tv, 0.0),
        0.0 if bias is None else score_tile(bias, head.sequence, head.h, head.rows),
        0.0 if sink is None else float(sink[head.h]),
    )


def cap_slopes(problem: Problem, t: Any) -> tuple[Any, Any]:
    """Return both derivatives of the softcap at t, in t's dtype; 1 and 0 without one."""
    if not problem.softcap:
        return t.dtype.type(1), t.dtype.type(0)
    capped = t / t.dtype.type(problem.softcap)
    first = 1 - capped * capped
    return first, -2 * capped * first / t.dtype.type(problem.softcap)


def slopes(problem: Problem, head: Head, functions: Functions, t: Any) -> tuple[Any, Any]:
    """Return f' and f'' at t, in t's dtype; 0 where P is 0, because the derivatives may be infinite or NaN there.

    functions: those of the head, in t's dtype.
    """
    by_cap, cap_curvature = cap_slopes(problem, t)
    by_score, curvature = functions.slopes(t, head.place)
    with np.errstate(invalid="ignore", over="ignore"):
        found = by_score * by_cap, curvature * by_cap**2 + by_score * cap_curvature
    first, second = (np.where(head.p > 0, x, t.dtype.type(0)) for x in found)
    return first, second


def head_tangent(problem: Problem, head: Head, along: Direction) -> Tangent:
    """Compute the tangent of one head."""
    visible = np.isfinite(head.s)
    x = problem.scale * (along.q @ head.k.T + head.q @ along.k.T)
    u = np.where(visible, slopes(problem, head, head.functions, head.t)[0] * x + along.bias, 0.0)
    lse = (head.p * u).sum(-1) + head.p_sink * along.sink
    dropped = head.p * head.d
    out = (dropped * u) @ head.v + dropped @ along.v - lse[:, None] * head.out
    return Tangent(x, u, out, lse)


def head_second(
    problem: Problem, head: Head, along: Direction, found: Tangent, do: Float, dl: Float
) -> Mapping[str, Any]:
    """Compute the terms that one head adds to every gradient of the tangent.

    do, dl: the head's queries in dout, dlse.
    """
    first, curvature = slopes(problem, head, head.functions, head.t)
    delta = (do * head.out).sum(-1) - dl
    w, e, g = head.d * (do @ head.v.T), head.d * (do @ along.v.T), (do * found.out).sum(-1)
    centred = found.u - found.lse[:, None]
    ds = head.p * (w - delta[:, None])
    ds2 = head.p * (centred * (w - delta[:, None]) + e - g[:, None])
    dt, dt2 = first * ds, first * ds2 + curvature * found.x * ds
    return {
        "dq": problem.scale * (dt2 @ head.k + dt @ along.k),
        "dk": problem.scale * (dt2.T @ head.q + dt.T @ along.q),
        "dv": (head.p * head.d * centred).T @ do,
        "dbias": ds2,
        "dsink": -(head.p_sink * ((along.sink - found.lse) * delta + g)).sum(),
        "dcaptured": head_captured(problem, head, head.functions, head.t, ds2, found.x * ds),
    }


def head_captured(
    problem: Problem, head: Head, functions: Functions, t: Any, ds2: Any, x_ds: Any, *, absolute: bool = False
) -> Any:
    """Return the gradients of captured arrays, flat, in t's dtype; None without such arrays.

    functions: as for `slopes`. absolute: the arguments are sums of absolute values, and so are the results.
    """
    if problem.captured is None:
        return None
    total = np.zeros(problem.captured.shape, t.dtype)
    if functions.graph.score is not None:
        by_cap = 1 if absolute else cap_slopes(problem, t)[0]
        functions.backward(t, head.place, ds2, total, absolute=absolute)
        functions.slope.backward(t, head.place, by_cap * x_ds, total, absolute=absolute)
    return total
