"""Accuracy of backends: float64 values, and an error budget for each result that is derived from the problem.

    error <= 2 * error of a plain implementation in that dtype + c * eps(dtype) * A             (gradients: 3 times)

A is the largest value of the result's own expression on absolute values. Where A is 0, the result must be 0. The plain
implementation is standard attention that stores its arrays in the inputs' dtype. It computes scores, softmax and sums
in float32 and rounds P and dt before the second product, as the definition allows. Scores s beyond 8 lose bits before
the softmax, and P loses them too: its relative error is eps |s|. One plain result shows this error only by chance, so
the budget adds it for such scores.

For long sequences A is far above the results. For independent random inputs (`random=True`: the benchmark's gate, the
self-test of a Vulkan driver), a tighter budget holds for 16-bit dtypes. P, dt, out and the results may each be rounded
independently, so the errors of the terms of a sum add up in quadrature:

    error <= 2 * error of the plain implementation + c * eps(compute dtype) * A + 4 * eps(dtype) * R

R is the square root of the sum of the squared terms. 4 eps is 8 times the largest error of one rounding. By Hoeffding's
bound, one sum in 10^13 exceeds it (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019).
Repeated numbers, such as equal scores, are all rounded in one direction, so this budget does not hold for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import reference
from .dtypes import DTYPES, narrow, widen
from .problem import Problem
from .reference import Arrays, Float, Head, Part, add_gradients, head_gradients, rows_lse
from .score.evaluate import Functions

ORDINARY_SCORE = 8.0
HALF = ("float16", "bfloat16")
STATISTICS = ("lse", "tlse", "ddlse")  # in the compute dtype; gradients depend on an out in the dtype of q


@dataclass(frozen=True)
class Expected:
    """Expected value of one result: in float64, from absolute values, and the largest accepted error.

    `known` marks the computed entries if only some were computed. The other entries are not compared.
    """

    value: Float
    magnitude: Float
    budget: float
    known: npt.NDArray[np.bool_] | None = None

    def error(self, got: npt.NDArray[Any]) -> float:
        """Return the largest absolute error; inf for a wrong shape, NaN, a wrong infinity or a value that must be 0."""
        if got.shape != self.value.shape:
            return np.inf
        values = widen(got, "bfloat16" if got.dtype == np.uint16 else got.dtype.name)
        want, magnitude = self.value, self.magnitude
        if self.known is not None:
            values, want, magnitude = (x[self.known] for x in (values, want, magnitude))
        finite = np.isfinite(want)
        fixed = ~finite | (magnitude == 0)
        if not np.array_equal(values[fixed], want[fixed]):
            return np.inf
        difference = np.abs(values[finite] - want[finite])
        return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def expected_forward(
    problem: Problem, arrays: Arrays, parts: Iterable[Part] | None = None, *, random: bool = False
) -> dict[str, Expected]:
    """Compute out and lse for all queries, or for those in `parts`.

    random: the inputs are independent random numbers.
    """
    sums = Sums(problem, {"out": problem.out_shape, "lse": problem.lse_shape}, random)
    sums.value["lse"][...] = -np.inf
    for head in reference.heads(problem, arrays, parts):
        plain, p = Plain(problem, arrays, head), head.p * head.d
        s = score_sizes(problem, head).max(axis=1, initial=0.0)
        size = np.where(np.isfinite(head.lse), np.maximum(s, 1.0), 0.0)  # sums near 1 have errors too
        sums.put("out", head.rows_q, head.out, plain.out, p @ np.abs(head.v), p**2 @ head.v**2)
        sums.put("lse", rows_lse(problem, head), head.lse, plain.lse, size, np.zeros_like(size))
    largest = sums.absolutes["lse"].max(initial=0.0)
    rule = Rule(2.0, 4.0, largest)
    return {name: sums.expected(name, rule, whole=parts is None) for name in ("out", "lse")}


def expected_backward(
    problem: Problem,
    arrays: Arrays,
    dout: Float,
    dlse: Float | None,
    parts: Iterable[Part] | None = None,
    *,
    random: bool = False,
) -> dict[str, Expected]:
    """Compute dq, dk, dv and, if the problem has them, dbias and dsink.

    With `parts`, only dq, dk and dv are computed. `parts` must hold every query of every head that shares a KV head.
    random: the inputs and dout are independent random numbers.
    """
    shapes = reference.gradient_shapes(problem)
    if parts is not None:
        shapes = {name: shape for name, shape in shapes.items() if name in ("dq", "dk", "dv")}
    sums = Sums(problem, shapes, random)
    largest = 0.0
    for head in reference.heads(problem, arrays, parts):
        do = dout[head.rows_q]
        dl = np.zeros_like(head.lse) if dlse is None else dlse[rows_lse(problem, head)]
        largest = max(largest, score_sizes(problem, head).max(initial=0.0))
        terms = head_gradients(problem, head, do, dl)
        add_gradients(sums.value, head, terms)
        add_gradients(sums.plain, head, Plain(problem, arrays, head).backward(do, dl))
        add_gradients(sums.absolutes, head, _absolutes(problem, head, do, dl))
        if sums.random:
            add_gradients(sums.squares, head, _squares(problem, head, do, terms["dbias"]))
        if parts is not None:
            add_gradients(sums.known, head, dict.fromkeys(sums.known, np.True_))
    rule = Rule(3.0, 8.0, largest)
    return {name: sums.expected(name, rule, whole=parts is None) for name in sums.value}


class Rule(NamedTuple):
    """Numbers of a budget: factors of the plain implementation's error and of eps * A, and the largest score."""

    times: float
    c: float
    largest_score: float


class Sums:
    """Sums of every result over heads: exact values, plain values, and the terms of the budgets."""

    def __init__(self, problem: Problem, shapes: Mapping[str, tuple[int, ...]], random: bool) -> None:
        def zeros(dtype: str) -> dict[str, npt.NDArray[Any]]:
            return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}

        self.problem = problem
        self.random = random and problem.dtype in HALF
        self.value, self.absolutes, self.squares = zeros("float64"), zeros("float64"), zeros("float64")
        self.plain, self.known = zeros(problem.compute_dtype), zeros("bool")

    def put(self, name: str, rows: Any, *terms: npt.NDArray[Any]) -> None:
        """Store rows that belong to one head. terms: exact value, plain value, absolute values and squares."""
        for sums, x in zip((self.value, self.plain, self.absolutes, self.squares), terms, strict=True):
            sums[name][rows] = x
        self.known[name][rows] = True

    def expected(self, name: str, rule: Rule, *, whole: bool) -> Expected:
        """Derive the error budget of one result by the formulas above."""
        value, compute = self.value[name], DTYPES[self.problem.compute_dtype]
        dtype = self.problem.compute_dtype if name in STATISTICS else self.problem.dtype
        known = DTYPES[dtype]
        # in float64, the definition is its own plain implementation
        times, c = (0.0, 64.0) if dtype == "float64" else (rule.times, rule.c)
        finite = np.isfinite(value)
        error = np.abs(round_to(self.plain[name][finite], dtype) - value[finite]).max(initial=0.0)
        scores = rule.times * compute.eps * max(0.0, rule.largest_score - ORDINARY_SCORE)
        scores *= 2.0 if dtype == "float64" else 1.0  # the definition loses as many bits as the backend does
        absolutes = float(self.absolutes[name].max(initial=0.0))
        rounding = c * known.eps * absolutes
        if self.random and dtype in HALF:
            largest = np.abs(value[finite]).max(initial=0.0)  # the result itself is rounded too
            squares = max(np.sqrt(self.squares[name].max(initial=0.0)), largest)
            rounding = min(rounding, c * compute.eps * absolutes + 4.0 * known.eps * squares)
        budget = times * error + rounding + scores * absolutes + known.smallest
        return Expected(value, self.absolutes[name], float(budget), None if whole else self.known[name])


def check(expected: Mapping[str, Expected], got: Mapping[str, npt.NDArray[Any] | None]) -> list[str]:
    """Return one line for each result whose error exceeds its budget; [] if all are within it."""
    lines = []
    for name, want in expected.items():
        value = got[name]
        error = np.inf if value is None else want.error(value)
        if not error <= want.budget:
            lines.append(f"{name}: error {error:.3g} > {want.budget:.3g}")
    return lines


def score_sizes(problem: Problem, head: Head) -> Float:
    """Return |s| of visible keys, or the products on absolute values if s does not show cancellation.

    Cancellation does not show after a softcap, and in float64, which has no plain implementation to compare with.
    """
    seen = np.isfinite(head.s)
    sizes = np.abs(np.where(seen, head.s, 0.0))
    if problem.dtype == "float64" or problem.softcap > 0:
        sizes = np.maximum(sizes, abs(problem.scale) * (np.abs(head.q) @ np.abs(head.k).T))
    if head.functions.graph.score is not None:
        slopes = head.functions.backward(head.t, head.place, np.ones_like(head.t), None, absolute=True)
        products = abs(problem.scale) * (np.abs(head.q) @ np.abs(head.k).T)
        sizes = np.maximum(sizes, np.where(seen & np.isfinite(slopes), slopes * products, 0.0))
    return np.where(seen, sizes, 0.0)


class Plain:
    """Standard attention of one head in the compute dtype, with the inputs' dtype in memory."""

    def __init__(self, problem: Problem, arrays: Arrays, head: Head) -> None:
        kind = np.dtype(problem.compute_dtype).type
        self.problem, self.head = problem, head
        self.q, self.k, self.v, self.d = (x.astype(kind) for x in (head.q, head.k, head.v, head.d))
        self.t = kind(problem.scale) * (self.q @ self.k.T)
        if problem.softcap > 0:
            self.t = kind(problem.softcap) * np.tanh(self.t / kind(problem.softcap))
        seen = np.isfinite(head.s)
        functions, place = head.functions, head.place
        scored = np.where(seen, functions.score(head.t, place), 0.0)
        terms = np.where(seen, head.s, 0.0) - scored  # bias and ALiBi
        values, indices = arrays.get("captured"), arrays.get("captured_indices")
        self.functions = Functions(functions.graph, values, indices, problem.compute_dtype)
        s = np.where(seen, self.functions.score(self.t, place) + terms.astype(kind), kind(-np.inf))
        sink = kind(-np.inf) if problem.sink is None else kind(np.asarray(arrays["sink"])[head.h])
        self.lse, self.p, self.p_sink = reference.softmax(s, sink)
        self.out = round_to(round_to(self.p * self.d, problem.dtype) @ self.v, problem.dtype)

    def backward(self, dout: Float, dlse: Float) -> dict[str, npt.NDArray[Any]]:
        """Compute the terms that this head adds to every gradient."""
        problem, kind = self.problem, self.t.dtype.type
        do = dout.astype(kind)
        delta = (do * self.out).sum(-1) - dlse.astype(kind)
        ds = self.p * (self.d * (do @ self.v.T) - delta[:, None])
        captured = None if problem.captured is None else np.zeros(problem.captured.shape, kind)
        dt = self.functions.backward(self.t, self.head.place, ds, captured)
        dt = dt * (1 - (self.t / kind(problem.softcap)) ** 2) if problem.softcap > 0 else dt
        dt = round_to(dt, problem.dtype)
        return {
            "dq": kind(problem.scale) * (dt @ self.k),
            "dk": kind(problem.scale) * (dt.T @ self.q),
            "dv": round_to(self.p * self.d, problem.dtype).T @ do,
            "dbias": ds,
            "dsink": -(self.p_sink * delta).sum(),
            "dcaptured": captured,
        }


def _absolutes(problem: Problem, head: Head, do: Float, dl: Float) -> dict[str, Any]:
    """Compute the terms of every gradient from absolute values."""
    q, k, v, do = (np.abs(x) for x in (head.q, head.k, head.v, do))
    delta = (do * ((head.p * head.d) @ v)).sum(-1) + np.abs(dl)
    ds = head.p * (head.d * (do @ v.T) + delta[:, None])
    captured = None if problem.captured is None else np.zeros(problem.captured.shape)
    dt = head.functions.backward(head.t, head.place, ds, captured, absolute=True)
    return {
        "dq": abs(problem.scale) * (dt @ k),
        "dk": abs(problem.scale) * (dt.T @ q),
        "dv": (head.p * head.d).T @ do,
        "dbias": ds,
        "dsink": (head.p_sink * delta).sum(),
        "dcaptured": captured,
    }


def _squares(problem: Problem, head: Head, do: Float, ds: Float) -> dict[str, Any]:
    """Compute the squared terms of every gradient: from P and dt, and from out through delta (one value per query)."""
    slope = 1.0 - (head.t / problem.softcap) ** 2 if problem.softcap > 0 else 1.0
    slope = slope * head.functions.backward(head.t, head.place, np.ones_like(ds), None)
    p, dt, delta = (head.p * slope), (ds * slope) ** 2, ((do * head.out) ** 2).sum(-1)
    return {
        "dq": problem.scale**2 * (dt @ head.k**2 + delta[:, None] * (p @ head.k) ** 2),
        "dk": problem.scale**2 * ((dt + p**2 * delta[:, None]).T @ head.q**2),
        "dv": ((head.p * head.d) ** 2).T @ do**2,
        "dbias": head.p**2 * delta[:, None],
        "dsink": (head.p_sink**2 * delta).sum(),
        "dcaptured": None if problem.captured is None else np.zeros(problem.captured.shape),  # not rounded to 16 bits
    }


def round_to(x: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return x rounded to a 16-bit dtype and stored in its own dtype; x itself for other dtypes."""
    return widen(narrow(x, dtype), dtype, x.dtype.name) if dtype in HALF else x
