"""Rounding to and from 16 bits, against ml_dtypes and NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from anyattn.definition.dtypes import narrow, raw, widen

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
