"""Rounding to and from 16 and 8 bits, against ml_dtypes and NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from anyattn.definition.dtypes import FLOAT8, narrow, raw, widen

EVERY = np.arange(2**16, dtype=np.uint16)


def test_widening_every_bfloat16_is_exact() -> None:
    expected = EVERY.view(ml_dtypes.bfloat16).astype(np.float32)
    for array in (EVERY, EVERY.view(ml_dtypes.bfloat16)):
        np.testing.assert_array_equal(widen(array, "bfloat16", "float32"), expected)
        with np.errstate(invalid="ignore"):  # signalling NaN
            exact = expected.astype(np.float64)
        np.testing.assert_array_equal(widen(array, "bfloat16"), exact)


def test_narrowing_to_bfloat16_rounds_to_nearest_even() -> None:
    """Each value, the midpoint to its neighbour, and one float32 step to either side of it."""
    upper = EVERY.astype(np.uint32) << np.uint32(16)
    for low in (0, 0x7FFF, 0x8000, 0x8001):
        values = (upper | np.uint32(low)).view(np.float32)
        got = narrow(values, "bfloat16")
        assert got.dtype == np.uint16
        number = ~np.isnan(values)
        assert np.isnan(widen(got[~number], "bfloat16")).all()
        np.testing.assert_array_equal(got[number], values[number].astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_narrowing_to_other_dtypes_rounds_once(dtype: str) -> None:
    values = np.array([[0.1, -0.0, np.inf], [np.nan, 1e30, 2049.0]])
    got = narrow(values, dtype)
    assert got.dtype == dtype
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, values.astype(dtype))
    np.testing.assert_array_equal(widen(got, dtype), got.astype(np.float64))


def test_raw_returns_a_view_for_any_layout() -> None:
    array = np.zeros((4, 6), ml_dtypes.bfloat16)[::2, ::-2]
    raw(array, "bfloat16")[...] = narrow(np.full(array.shape, 1.5), "bfloat16")
    assert (array == 1.5).all()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_widen_every_float8(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(getattr(ml_dtypes, dtype))
    for array in (codes, values):
        np.testing.assert_array_equal(widen(array, dtype), values.astype(np.float64))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_narrow_every_float8_and_what_lies_between(dtype: str) -> None:
    """Each value, the midpoint to its neighbour, one float32 step to either side of it, and what is too large."""
    kind = getattr(ml_dtypes, dtype)
    values = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    finite = np.unique(values[np.isfinite(values)])
    middle = (finite[1:] + finite[:-1]) / 2
    beyond = np.array([460, 464, 465, 6e4, 6.2e4, 1e9, -1e9, np.inf, -np.inf, np.nan, 1e-9, -0.0], np.float32)
    steps = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    for x in (finite, middle, *steps, beyond):
        with np.errstate(over="ignore", invalid="ignore"):
            want = x.astype(kind)
        np.testing.assert_array_equal(widen(narrow(x, dtype), dtype), want.astype(np.float64))
        number = ~np.isnan(x)
        np.testing.assert_array_equal(narrow(x, dtype)[number], want[number].view(np.uint8))
