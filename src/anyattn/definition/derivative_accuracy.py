"""Error budgets of tangents and second derivatives, derived as in `accuracy.py`.

The plain implementation computes the formulas of `derivatives.py` in the compute dtype. It rounds P D u, P D, dt and
dt' to the inputs' dtype before the second product. A second derivative contains products of two sums over keys, so c is
twice the c of a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .accuracy import Expected, Plain, Rule, Sums, round_to, score_sizes
from .derivatives import Direction, Tangent, direction, head_captured, head_second, head_tangent, slopes
from .problem import Problem
from .reference import Arrays, Float, Head, add_gradients, gradient_shapes, heads, rows_lse

TANGENT_RULE, SECOND_RULE = (3.0, 8.0), (3.0, 16.0)


def expected_tangent(problem: Problem, arrays: Arrays, tangents: Arrays) -> dict[str, Expected]:
    """Compute tout and tlse."""
    sums = Sums(problem, {"tout": problem.out_shape, "tlse": problem.lse_shape}, random=False)
    largest = 0.0
    for head in heads(problem, arrays):
        largest = max(largest, score_sizes(problem, head).max(initial=0.0))
        along = direction(head, tangents)
        found = head_tangent(problem, head, along)
        plain, sizes = _PlainDerivatives(problem, arrays, head, along), _absolute_tangent(problem, head, along)
        _put(sums, problem, head, ("tout", "tlse"), found, plain.tangent, sizes)
    rule = Rule(*TANGENT_RULE, largest)
    return {name: sums.expected(name, rule, whole=True) for name in ("tout", "tlse")}


def expected_second(
    problem: Problem, arrays: Arrays, dout: Float, dlse: Float | None, tangents: Arrays
) -> dict[str, Expected]:
    """Compute the arrays of `SecondGradients` that the problem has."""
    shapes = {**gradient_shapes(problem), "ddout": problem.out_shape, "ddlse": problem.lse_shape}
    sums = Sums(problem, shapes, random=False)
    largest = 0.0
    for head in heads(problem, arrays):
        largest = max(largest, score_sizes(problem, head).max(initial=0.0))
        do = dout[head.rows_q]
        dl = np.zeros_like(head.lse) if dlse is None else dlse[rows_lse(problem, head)]
        along = direction(head, tangents)
        found = head_tangent(problem, head, along)
        plain, sizes = _PlainDerivatives(problem, arrays, head, along), _absolute_tangent(problem, head, along)
        _put(sums, problem, head, ("ddout", "ddlse"), found, plain.tangent, sizes)
        _add(sums.value, head, head_second(problem, head, along, found, do, dl))
        _add(sums.plain, head, plain.second(do, dl))
        _add(sums.absolutes, head, _absolute_second(problem, head, along, sizes, do, dl))
    rule = Rule(*SECOND_RULE, largest)
    return {name: sums.expected(name, rule, whole=True) for name in shapes}


def _put(
    sums: Sums, problem: Problem, head: Head, names: tuple[str, str], found: Tangent, plain: Tangent, sizes: Tangent
) -> None:
    out, lse = names
    sums.put(out, head.rows_q, found.out, plain.out, sizes.out, np.zeros_like(sizes.out))
    sums.put(lse, rows_lse(problem, head), found.lse, plain.lse, sizes.lse, np.zeros_like(sizes.lse))


def _add(sums: Mapping[str, npt.NDArray[Any]], head: Head, terms: Mapping[str, Any]) -> None:
    gradients = {name: total for name, total in sums.items() if name in terms}
    add_gradients(gradients, head, terms)


class _PlainDerivatives:
    """Derivatives of one head in the compute dtype, with the inputs' dtype in memory."""

    def __init__(self, problem: Problem, arrays: Arrays, head: Head, along: Direction) -> None:
        self.problem, self.plain = problem, Plain(problem, arrays, head)
        self.kind = kind = self.plain.t.dtype.type
        self.along = Direction(*[np.asarray(x).astype(kind) for x in along])  # type: ignore[arg-type]
        p, d = self.plain.p, self.plain.d
        self.x = kind(problem.scale) * (self.along.q @ self.plain.k.T + self.plain.q @ self.along.k.T)
        self.slopes = slopes(problem, head, self.plain.functions, self.plain.t)
        u = np.where(np.isfinite(head.s), self.slopes[0] * self.x + self.along.bias, kind(0))
        lse = (p * u).sum(-1) + self.plain.p_sink * self.along.sink
        out = round_to(p * d * u, problem.dtype) @ self.plain.v + round_to(p * d, problem.dtype) @ self.along.v
        self.tangent = Tangent(self.x, u, round_to(out - lse[:, None] * self.plain.out, problem.dtype), lse)

    def second(self, dout: Float, dlse: Float) -> dict[str, npt.NDArray[Any]]:
        """Return this head's terms of every gradient of the tangent."""
        problem, plain, along, kind = self.problem, self.plain, self.along, self.kind
        do = dout.astype(kind)
        first, curvature = self.slopes
        delta = (do * plain.out).sum(-1) - dlse.astype(kind)
        g = (do * self.tangent.out).sum(-1)
        centred = self.tangent.u - self.tangent.lse[:, None]
        dp = plain.d * (do @ plain.v.T) - delta[:, None]
        ds = plain.p * dp
        ds2 = plain.p * (centred * dp + plain.d * (do @ along.v.T) - g[:, None])
        dt, dt2 = (round_to(x, problem.dtype) for x in (first * ds, first * ds2 + curvature * self.x * ds))
        return {
            "dq": kind(problem.scale) * (dt2 @ plain.k + dt @ along.k),
            "dk": kind(problem.scale) * (dt2.T @ plain.q + dt.T @ along.q),
            "dv": round_to(plain.p * plain.d * centred, problem.dtype).T @ do,
            "dbias": ds2,
            "dsink": -(plain.p_sink * ((along.sink - self.tangent.lse) * delta + g)).sum(),
            "dcaptured": head_captured(problem, plain.head, plain.functions, plain.t, ds2, self.x * ds),
        }


def _absolute_tangent(problem: Problem, head: Head, along: Direction) -> Tangent:
    """Return the terms of a tangent on absolute values."""
    q, k, v = (np.abs(x) for x in (head.q, head.k, head.v))
    x = abs(problem.scale) * (np.abs(along.q) @ k.T + q @ np.abs(along.k).T)
    slope, _ = _absolute_slopes(problem, head)
    u = np.where(np.isfinite(head.s), slope * x + np.abs(along.bias), 0.0)
    lse = (head.p * u).sum(-1) + head.p_sink * abs(along.sink)
    dropped = head.p * head.d
    out = (dropped * u) @ v + dropped @ np.abs(along.v) + lse[:, None] * (dropped @ v)
    return Tangent(x, u, out, lse)


def _absolute_slopes(problem: Problem, head: Head) -> tuple[Any, Any]:
    """Return bounds of |f'| and |f''|: the terms of the chain rule on absolute values, with 1 for the softcap."""
    functions, zero = head.functions, np.zeros_like(head.t)
    by_score, curvature = (np.abs(np.where(head.p > 0, x, zero)) for x in functions.slopes(head.t, head.place))
    return by_score, curvature + (by_score * 2 / problem.softcap if problem.softcap else 0.0)


def _absolute_second(
    problem: Problem, head: Head, along: Direction, sizes: Tangent, do: Float, dl: Float
) -> dict[str, Any]:
    """Return the terms of every gradient of the tangent on absolute values."""
    q, k, v, do = (np.abs(x) for x in (head.q, head.k, head.v, do))
    dropped = head.p * head.d
    delta = (do * (dropped @ v)).sum(-1) + np.abs(dl)
    g = (do * sizes.out).sum(-1)
    centred = sizes.u + sizes.lse[:, None]
    dp = head.d * (do @ v.T) + delta[:, None]
    ds = head.p * dp
    ds2 = head.p * (centred * dp + head.d * (do @ np.abs(along.v).T) + g[:, None])
    slope, curvature = _absolute_slopes(problem, head)
    dt, dt2 = slope * ds, slope * ds2 + curvature * sizes.x * ds
    return {
        "dq": abs(problem.scale) * (dt2 @ k + dt @ np.abs(along.k)),
        "dk": abs(problem.scale) * (dt2.T @ q + dt.T @ np.abs(along.q)),
        "dv": (dropped * centred).T @ do,
        "dbias": ds2,
        "dsink": (head.p_sink * ((abs(along.sink) + sizes.lse) * delta + g)).sum(),
        "dcaptured": head_captured(problem, head, head.functions, head.t, ds2, sizes.x * ds, absolute=True),
    }
