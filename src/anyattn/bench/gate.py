"""The correctness gate: no speed of a wrong result. Results against float64, on all rows or, of large cases, on some.

Written here row by row, so that a case of any size can be checked; the tests hold it to `reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..definition import philox
from .cases import Case
from .inputs import SEED, Inputs

if TYPE_CHECKING:
    from torch import Tensor

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Of the largest value: P and dt may be rounded to the dtype of the inputs.
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
SPREAD = (0.8, 1.25)  # accepted mean of squared deviations from the average over dropout, in units of the variance
ALL_SCORES = 2**21  # up to so many everything is compared
ALL_BYTES = 2**26  # of K and V
ROWS = 24  # else so many rows of a head
BACKWARD_SCORES = 2**22  # at a time


@dataclass(frozen=True, slots=True)
class Place:
    """Some rows (forward) or all rows (backward) of one query head of one sequence."""

    b: int
    h: int
    rows: Ints


@dataclass(frozen=True, slots=True)
class Scores:
    """Of some rows of one head: probabilities, dropout factors, dt/ds, and the inputs as float64."""

    p: Float
    d: Float
    slope: Float | float
    q: Float
    k: Float
    v: Float
    do: Float


def scores(inputs: Inputs, b: int, h: int, rows: Ints, drop: bool) -> Scores:
    """The definition of attention on these rows; `drop`: with the dropout of SEED."""
    case, sequence = inputs.case, inputs.sequence(b)
    q, do = (_float64(x[rows, h]) for x in (sequence.q, sequence.dout))
    k, v = (_float64(x[:, h // case.group]) for x in (sequence.k, sequence.v))
    n_q, n_k = len(sequence.q), len(k)
    t = np.asarray(case.head_dim**-0.5 * (q @ k.T))
    slope: Any = 1.0
    if case.softcap:
        tanh = np.tanh(t / case.softcap)
        t, slope = case.softcap * tanh, 1.0 - tanh**2
    lo, hi = case.bounds(n_q, n_k)
    keys = np.arange(n_k)
    seen = (lo[rows, None] <= keys) & (keys < hi[rows, None])
    hidden = case.hidden(n_q, n_k)
    if hidden is not None:
        seen &= ~hidden[rows if len(hidden) > 1 else slice(None)]
    if inputs.bias is not None:
        bias = inputs.bias[0, h if inputs.bias.shape[1] > 1 else 0]
        t = t + _float64(bias[rows] if bias.shape[0] > 1 else bias)
    if inputs.alibi_slopes is not None:
        t = t - float(inputs.alibi_slopes[h]) * np.abs(rows[:, None] + n_k - n_q - keys)
    t = np.where(seen, t, -np.inf)
    sink = -np.inf if inputs.sink is None else float(inputs.sink[h])
    top = np.maximum(t.max(axis=1, initial=-np.inf), sink)
    top = np.where(np.isfinite(top), top, 0.0)[:, None]
    e = np.exp(t - top)
    total = e.sum(axis=1, keepdims=True) + np.exp(sink - top)
    p = e / np.where(total > 0, total, 1.0)
    d: Float = np.ones((1, 1))
    if drop and case.dropout_p:
        kept = philox.keep(np.array([SEED, 0]), case.dropout_p, b * case.nheads + h, rows, keys)
        d = np.asarray(kept * philox.keep_scale(case.dropout_p), np.float64)
    return Scores(p, d, slope, q, k, v, do)


@dataclass(frozen=True, slots=True)
class Expected:
    """A part of one result: what rows of one head of one sequence must be."""

    name: str
    result: int  # index in the list of results
    b: int
    place: tuple[Any, int]  # rows, head
    want: Float


class Gate:
    """Float64 values of a case, computed once; then any number of providers' results against them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @cached_property
    def expected(self) -> list[Expected]:
        return list(_backward(self.inputs) if self.inputs.case.backward else _forward(self.inputs))

    def wrong(self, results: list[Tensor], own_dropout: bool = False) -> str | None:
        """None, or how results (out, or dq, dk and dv, in the layouts of the inputs) differ from float64.

        `own_dropout`: other entries were dropped than the definition's, so only averages and spread can be compared.
        """
        inputs = self.inputs
        arrays = (inputs.q, inputs.k, inputs.v) if inputs.case.backward else (inputs.dout,)
        shapes = [tuple(x.shape) for x in arrays]
        if [tuple(x.shape) for x in results] != shapes:
            return f"shapes {[tuple(x.shape) for x in results]} are not {shapes}"
        if own_dropout:
            return _wrong_spread(inputs, results[0])
        tolerance, errors = TOLERANCE[inputs.case.dtype], self.errors(results)
        for name, (error, largest) in errors.items():
            if not error <= tolerance * largest:  # NaN too
                return f"{name}: error {error:.1e} of {largest:.1e} exceeds {tolerance:.0e}"
        return None

    def errors(self, results: list[Tensor]) -> dict[str, tuple[float, float]]:
        """Result -> largest absolute error (NaN where it is not finite) and largest value."""
        found: dict[str, tuple[float, float]] = {}
        for part in self.expected:
            got = _float64(_rows(self.inputs, results[part.result], part.b)[part.place])
            error = float(np.abs(got - part.want).max(initial=0.0))
            before, largest = found.get(part.name, (0.0, 0.0))
            largest = max(largest, float(np.abs(part.want).max(initial=0.0)))
            found[part.name] = (float(np.maximum(before, error)), largest)
        return found


def _forward(inputs: Inputs) -> Iterator[Expected]:
    for place in _places(inputs.case):
        s = scores(inputs, place.b, place.h, place.rows, drop=True)
        yield Expected("out", 0, place.b, (place.rows, place.h), (s.p * s.d) @ s.v)


def _backward(inputs: Inputs) -> Iterator[Expected]:
    """dq, dk and dv of whole heads: a key's gradients need every row."""
    case = inputs.case
    sizes = list(case.sequences())
    for b, h_kv in _kv_heads(case):
        n_q, n_k = sizes[b]
        dk, dv = np.zeros((n_k, case.head_dim)), np.zeros((n_k, case.head_dim_v))
        step = max(1, BACKWARD_SCORES // max(1, n_k))
        for h in range(h_kv * case.group, (h_kv + 1) * case.group):
            for start in range(0, n_q, step):
                rows = np.arange(start, min(n_q, start + step))
                s = scores(inputs, b, h, rows, drop=True)
                dp = s.d * (s.do @ s.v.T)
                ds = s.p * (dp - (s.p * dp).sum(axis=1, keepdims=True))
                dt = case.head_dim**-0.5 * ds * s.slope
                dk += dt.T @ s.q
                dv += (s.p * s.d).T @ s.do
                yield Expected("dq", 0, b, (rows, h), dt @ s.k)
        yield Expected("dk", 1, b, (slice(None), h_kv), dk)
        yield Expected("dv", 2, b, (slice(None), h_kv), dv)


def _wrong_spread(inputs: Inputs, out: Tensor) -> str | None:
    """Over a provider's own dropout, out_i has mean sum_j P_ij v_j and variance p / (1 - p) sum_j P_ij^2 v_j^2."""
    odds = inputs.case.dropout_p / (1.0 - inputs.case.dropout_p)
    squares = []
    for place in _places(inputs.case):
        s = scores(inputs, place.b, place.h, place.rows, drop=False)
        got = _float64(_rows(inputs, out, place.b)[place.rows, place.h])
        squares.append((got - s.p @ s.v) ** 2 / (odds * (s.p**2 @ s.v**2)))
    mean = float(np.concatenate([x.ravel() for x in squares]).mean())
    if not SPREAD[0] <= mean <= SPREAD[1]:
        return f"dropout: the spread is {mean:.2f} of what it must be"
    return None


def _places(case: Case) -> Iterator[Place]:
    """All rows of every head, or some of the first, a middle and the last head of some sequences."""
    sizes = list(case.sequences())
    few = _large(case)
    rng = np.random.default_rng(0)
    for b in _some(len(sizes), few):
        n_q = sizes[b][0]
        for h in _some(case.nheads, few):
            rows = np.arange(n_q)
            if few and n_q > ROWS:
                rows = np.unique(np.concatenate([[0, n_q - 1], rng.integers(0, n_q, ROWS)]))
            yield Place(b, h, rows)


def _kv_heads(case: Case) -> Iterator[tuple[int, int]]:
    """(sequence, KV head): all, or the first and the last."""
    sizes = list(case.sequences())
    few = _large(case)
    found = [(b, h) for b in range(len(sizes)) for h in range(case.nheads_kv)]
    yield from dict.fromkeys([found[0], found[-1]]) if few else found


def _large(case: Case) -> bool:
    """Whether only a part is compared."""
    return sum(n_q * n_k for n_q, n_k in case.sequences()) * case.nheads > ALL_SCORES or case.kv_bytes > ALL_BYTES


def _some(count: int, few: bool) -> list[int]:
    return sorted({0, count // 2, count - 1}) if few else list(range(count))


def _rows(inputs: Inputs, array: Tensor, b: int) -> Tensor:
    if not inputs.case.packed:
        return array[b]
    start, end = (int(x) for x in inputs.cu_seqlens[b : b + 2])
    return array[start:end]


def _float64(x: Any) -> Float:
    return np.asarray(x.detach().double().numpy())
