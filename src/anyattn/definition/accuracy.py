"""How wrong a backend may be: float64 values, and for each result an error budget that follows from the problem.

    error <= 2 * error of a plain implementation in that dtype + c * eps(dtype) * A             (gradients: 3 times)

A is the largest value of the result's own expression on absolute values, and where that is 0 the result must be 0. The
plain implementation is standard attention with the inputs' dtype in memory: scores, softmax and sums in float32, P and
dt rounded before the second product, as the definition allows. Scores s beyond 8 lose bits before the softmax, and P
with them: a relative error of eps |s|, which one plain result shows only by chance, so for those it is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import reference
from .dtypes import DTYPES, narrow, widen
from .problem import Problem
from .reference import Arrays, Float, Head, add_dbias, rows_lse

ORDINARY_SCORE = 8.0


@dataclass(frozen=True)
class Expected:
    """One result: its float64 value, the same expression on absolute values, and the largest error accepted."""

    value: Float
    magnitude: Float
    budget: float

    def error(self, got: npt.NDArray[Any]) -> float:
        """Largest absolute error; inf for a wrong shape, a NaN, a wrong infinity, not 0 where nothing contributes."""
        if got.shape != self.value.shape:
            return np.inf
        values = widen(got, "bfloat16" if got.dtype == np.uint16 else got.dtype.name)
        finite = np.isfinite(self.value)
        fixed = ~finite | (self.magnitude == 0)
        if not np.array_equal(values[fixed], self.value[fixed]):
            return np.inf
        difference = np.abs(values[finite] - self.value[finite])
        return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


@dataclass(frozen=True)
class _Rule:
    """The budget's numbers: a multiple of the plain implementation's error, of eps * A, and what large scores add."""

    times: float
    c: float
    scores: float


def expected_forward(problem: Problem, arrays: Arrays) -> dict[str, Expected]:
    """out and lse."""
    value_out, value_lse = reference.forward(problem, arrays)
    out, lse = _Sum(problem, value_out), _Sum(problem, value_lse)
    for head in reference.heads(problem, arrays):
        plain = _Plain(problem, arrays, head)
        out.add(head.rows_q, plain.out, (head.p * head.d) @ np.abs(head.v))
        s = _score_sizes(problem, head).max(axis=1, initial=0.0)
        size = np.where(np.isfinite(head.lse), np.maximum(s, 1.0), 0.0)  # a sum near 1 has errors too
        lse.add(rows_lse(problem, head), plain.lse, size)
    lse.plain[~np.isfinite(value_lse)] = -np.inf
    rule = _rule(problem, lse.magnitude.max(initial=0.0), gradient=False)
    return {"out": out.expected(rule, problem.dtype), "lse": lse.expected(rule, problem.compute_dtype)}


def expected_backward(problem: Problem, arrays: Arrays, dout: Float, dlse: Float | None) -> dict[str, Expected]:
    """dq, dk, dv and, where the problem has them, dbias and dsink."""
    exact = vars(reference.backward(problem, arrays, dout, dlse))
    sums = {name: _Sum(problem, value) for name, value in exact.items() if value is not None}
    largest = 0.0
    for head in reference.heads(problem, arrays):
        largest = max(largest, _score_sizes(problem, head).max(initial=0.0))
        do = dout[head.rows_q]
        dl = np.zeros_like(head.lse) if dlse is None else dlse[rows_lse(problem, head)]
        plain = _Plain(problem, arrays, head)
        terms, sizes = plain.backward(do, dl), _magnitudes(problem, arrays, head, do, dl)
        rows = {"dq": head.rows_q, "dk": head.rows_k, "dv": head.rows_k, "dsink": (head.h,)}
        for name, total in sums.items():
            if name == "dbias":
                add_dbias(total.plain, head, terms[name])
                add_dbias(total.magnitude, head, sizes[name])
            else:
                total.add(rows[name], terms[name], sizes[name])
    rule = _rule(problem, largest, gradient=True)
    return {name: total.expected(rule, problem.dtype) for name, total in sums.items()}


def check(expected: Mapping[str, Expected], got: Mapping[str, npt.NDArray[Any] | None]) -> list[str]:
    """[] or one line for each result whose error is beyond its budget."""
    lines = []
    for name, want in expected.items():
        value = got[name]
        error = np.inf if value is None else want.error(value)
        if not error <= want.budget:
            lines.append(f"{name}: error {error:.3g} > {want.budget:.3g}")
    return lines


def _score_sizes(problem: Problem, head: Head) -> Float:
    """|s| where seen, and the products on absolute values where s does not show what cancels in them.

    That is behind a softcap, and in float64, which has no plain implementation beside it.
    """
    seen = np.isfinite(head.s)
    sizes = np.abs(np.where(seen, head.s, 0.0))
    if problem.dtype == "float64" or problem.softcap > 0:
        sizes = np.maximum(sizes, abs(problem.scale) * (np.abs(head.q) @ np.abs(head.k).T))
    return np.where(seen, sizes, 0.0)


def _rule(problem: Problem, largest_score: float, gradient: bool) -> _Rule:
    times = 3.0 if gradient else 2.0
    scores = times * DTYPES[problem.compute_dtype].eps * max(0.0, largest_score - ORDINARY_SCORE)
    if problem.dtype == "float64":
        return _Rule(0.0, 64.0, scores)  # the definition is its own plain implementation
    return _Rule(times, 8.0 if gradient else 4.0, scores)


class _Sum:
    """One result while its heads are added up: from the plain implementation, and on absolute values."""

    def __init__(self, problem: Problem, value: Float) -> None:
        self.value = value
        self.plain = np.zeros(value.shape, problem.compute_dtype)
        self.magnitude = np.zeros(value.shape)

    def add(self, rows: Any, plain: npt.NDArray[Any], magnitude: Float) -> None:
        np.add.at(self.plain, rows, plain)
        np.add.at(self.magnitude, rows, magnitude)

    def expected(self, rule: _Rule, dtype: str) -> Expected:
        finite = np.isfinite(self.value)
        difference = np.abs(round_to(self.plain[finite], dtype) - self.value[finite])
        largest = self.magnitude.max(initial=0.0)
        rounding = (rule.c * DTYPES[dtype].eps + rule.scores) * largest + DTYPES[dtype].smallest
        return Expected(self.value, self.magnitude, float(rule.times * difference.max(initial=0.0) + rounding))


class _Plain:
    """Standard attention of one head in the compute dtype, with the inputs' dtype in memory."""

    def __init__(self, problem: Problem, arrays: Arrays, head: Head) -> None:
        kind = np.dtype(problem.compute_dtype).type
        self.problem, self.head = problem, head
        self.q, self.k, self.v, self.d = (x.astype(kind) for x in (head.q, head.k, head.v, head.d))
        self.t = kind(problem.scale) * (self.q @ self.k.T)
        if problem.softcap > 0:
            self.t = kind(problem.softcap) * np.tanh(self.t / kind(problem.softcap))
        seen = np.isfinite(head.s)
        terms = np.where(seen, head.s, 0.0) - np.where(seen, head.t, 0.0)  # bias and ALiBi
        s = np.where(seen, self.t + terms.astype(kind), kind(-np.inf))
        self.sink = kind(-np.inf) if problem.sink is None else kind(np.asarray(arrays["sink"])[head.h])
        top = np.maximum(s.max(axis=1, initial=-np.inf), self.sink)
        safe = np.where(np.isfinite(top), top, kind(0))
        with np.errstate(divide="ignore"):
            self.lse = safe + np.log(np.exp(s - safe[:, None]).sum(axis=1) + np.exp(self.sink - safe))
        self.p = np.exp(s - np.where(np.isfinite(self.lse), self.lse, kind(0))[:, None])
        self.out = round_to(round_to(self.p * self.d, problem.dtype) @ self.v, problem.dtype)

    def backward(self, dout: Float, dlse: Float) -> dict[str, npt.NDArray[Any]]:
        """This head's terms of every gradient."""
        problem, kind = self.problem, self.t.dtype.type
        do = dout.astype(kind)
        delta = (do * self.out).sum(-1) - dlse.astype(kind)
        ds = self.p * (self.d * (do @ self.v.T) - delta[:, None])
        dt = ds * (1 - (self.t / kind(problem.softcap)) ** 2) if problem.softcap > 0 else ds
        dt = round_to(dt, problem.dtype)
        weight = np.exp(np.minimum(self.sink - self.lse, 0)) if np.isfinite(self.sink) else np.zeros_like(delta)
        return {
            "dq": kind(problem.scale) * (dt @ self.k),
            "dk": kind(problem.scale) * (dt.T @ self.q),
            "dv": round_to(self.p * self.d, problem.dtype).T @ do,
            "dbias": ds,
            "dsink": -(weight * delta).sum(),
        }


def _magnitudes(problem: Problem, arrays: Arrays, head: Head, do: Float, dl: Float) -> dict[str, Any]:
    """The terms of every gradient on absolute values."""
    q, k, v, do = (np.abs(x) for x in (head.q, head.k, head.v, do))
    delta = (do * ((head.p * head.d) @ v)).sum(-1) + np.abs(dl)
    ds = head.p * (head.d * (do @ v.T) + delta[:, None])
    sink = -np.inf if problem.sink is None else float(np.asarray(arrays["sink"])[head.h])
    weight = np.exp(np.minimum(sink - head.lse, 0.0)) if np.isfinite(sink) else np.zeros_like(delta)
    return {
        "dq": abs(problem.scale) * (ds @ k),
        "dk": abs(problem.scale) * (ds.T @ q),
        "dv": (head.p * head.d).T @ do,
        "dbias": ds,
        "dsink": (weight * delta).sum(),
    }


def round_to(x: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """x rounded to a 16-bit dtype, in its own type; other dtypes leave it alone."""
    return widen(narrow(x, dtype), dtype, x.dtype.name) if dtype in ("float16", "bfloat16") else x
