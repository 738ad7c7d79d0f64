"""Masks as intervals: bounds against the rules one by one, rows against columns, and that bounds never decrease."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyattn import Mask
from anyattn.definition.options import Options
from anyattn.definition.validate import make_problem
from anyattn.frameworks.numpy import adapter
from anyattn.testing import Case, Span
from harness.oracle import visible

SIDES = st.one_of(st.none(), st.integers(0, 12))
LENGTHS = {"n_q": st.integers(0, 12), "n_k": st.integers(0, 14), "leftpad": st.integers(0, 5)}
RULES = {"left": SIDES, "right": SIDES, "chunk": st.integers(0, 6), "offset": st.integers(-15, 15)}


Side = int | None


def _brute(n_q: int, n_k: int, leftpad: int, left: Side, right: Side, chunk: int, offset: int) -> np.ndarray:
    case = Case("interval", window=(left, right), chunk=chunk)
    return visible(case, Span(0, n_q, n_k, leftpad, offset, None, None))


@given(**LENGTHS, **RULES)
def test_bounds_equal_the_rules(n_q, n_k, leftpad, left, right, chunk, offset) -> None:
    n_k += leftpad
    lo, hi = Mask(left, right, chunk).bounds(np.arange(n_q) + offset, n_k, leftpad)
    keys = np.arange(n_k)
    seen = (lo[:, None] <= keys) & (keys < hi[:, None])
    assert np.array_equal(seen, _brute(n_q, n_k, leftpad, left, right, chunk, offset))


@given(**LENGTHS, **RULES)
def test_bounds_never_decrease(n_q, n_k, leftpad, left, right, chunk, offset) -> None:
    lo, hi = Mask(left, right, chunk).bounds(np.arange(n_q) + offset, n_k + leftpad, leftpad)
    assert (np.diff(lo) >= 0).all() and (np.diff(hi) >= 0).all()


@given(**LENGTHS, **RULES)
def test_queries_of_a_key_are_an_interval(n_q, n_k, leftpad, left, right, chunk, offset) -> None:
    """The bounds by columns that backward kernels loop over (SEMANTICS: "rows that see key j")."""
    n_k += leftpad
    seen = _brute(n_q, n_k, leftpad, left, right, chunk, offset)
    for j in range(leftpad, n_k):
        c = j - leftpad
        start = [0] + ([c - right - offset] if right is not None else [])
        start += [chunk * (c // chunk) - offset] if chunk else []
        stop = [n_q] + ([c + left + 1 - offset] if left is not None else [])
        stop += [chunk * (c // chunk + 1) - offset] if chunk else []
        assert np.array_equal(np.flatnonzero(seen[:, j]), np.arange(max(start), max(*start, min(stop))))


@given(left=st.integers(-30, 5), right=st.integers(-30, 5), offset=st.integers(-5, 20))
def test_negative_bounds_follow_the_formula(left: int, right: int, offset: int) -> None:
    """`Mask` takes any integers, unlike `attention`."""
    p, c = np.arange(9)[:, None] + offset, np.arange(14)
    lo, hi = Mask(left, right).bounds(p[:, 0], 14)
    assert np.array_equal((lo[:, None] <= c) & (c < hi[:, None]), (c >= p - left) & (c <= p + right))


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("bound", [None, 3, 16, 17, 10**12, 2**62])
def test_bounds_of_a_problem_are_clamped_without_effect(bound: int | None, chunk: int) -> None:
    """Check that clamping window sides against overflow does not change the visible keys."""
    array = adapter.describe(np.zeros((1, 8, 1, 4)))
    problem = make_problem({"q": array, "k": array, "v": array}, Options(left=bound, right=bound, chunk=chunk))
    lo, hi = problem.interval.bounds(np.arange(8), 8)
    keys = np.arange(8)
    assert np.array_equal((lo[:, None] <= keys) & (keys < hi[:, None]), _brute(8, 8, 0, bound, bound, chunk, 0))
    assert all(side is None or abs(side) < 2**31 for side in (problem.interval.left, problem.interval.right))


def test_masks_equal_the_pictures_of_the_documentation() -> None:
    """The two pictures in the documentation of `attention`."""
    lo, hi = Mask(right=0).bounds(np.arange(2) + 3, 5)
    assert (lo.tolist(), hi.tolist()) == ([0, 0], [4, 5])
    lo, hi = Mask(right=0).bounds(np.arange(5) - 3, 2)
    assert np.maximum(hi - lo, 0).tolist() == [0, 0, 0, 1, 2]


def test_division_rounds_down_for_negative_positions() -> None:
    lo, hi = Mask(chunk=4).bounds(np.arange(-5, 5), 8)
    assert [(int(a), int(b)) for a, b in zip(lo, hi, strict=True) if a < b] == [(0, 4)] * 4 + [(4, 8)]
