"""The cases of the matrix with JAX arrays, eager and compiled, against float64 within the budget of every backend."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition.dtypes import DTYPES
from anyattn.testing import Case
from harness import jax_arrays
from harness.cases import ALL, SMALL
from harness.checks import bits


def has_backward(case: Case) -> bool:
    return not case.paged


def differ(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether bits differ by more than the flushing of denormal numbers, and of their products, explains."""
    if np.array_equal(bits(x), bits(y)):
        return False
    smallest = DTYPES["float64" if x.dtype == np.float64 else "float32"].smallest
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):  # infinity - infinity, where both are the same
        return not (same | (np.abs(x.astype(np.float64) - y.astype(np.float64)) < smallest)).all()


@pytest.mark.parametrize("direction", testing.PASSES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_compiled_call_equals_reference(case: Case, direction: str) -> None:
    inputs = testing.make_inputs(case)
    before = inputs.bytes()
    if direction == "backward" and (case.stored or not has_backward(case)):
        reason = "has no backward pass for quantised" if case.stored else "has no backward through a KV cache"
        with pytest.raises(anyattn.UnsupportedProblem, match=reason):
            jax_arrays.compute(inputs, direction, "cpu", jit=True)
        if not case.stored:
            return
    got = jax_arrays.compute(inputs, direction, None, jit=True)
    assert inputs.bytes() == before
    assert not testing.malformed(inputs, got)
    assert not testing.compare(testing.expected(inputs, direction), got)


@pytest.mark.parametrize("direction", testing.PASSES)
@pytest.mark.parametrize("case", SMALL[::2], ids=str)
def test_eager_call_has_the_bits_of_numpy_arrays(case: Case, direction: str) -> None:
    """XLA passes contiguous copies: another layout, and the same sums. Its threads flush denormal numbers to 0."""
    if direction == "backward" and (case.stored or not has_backward(case)):
        return
    inputs = testing.make_inputs(case)
    got, want = jax_arrays.compute(inputs, direction, "cpu", jit=False), testing.compute(inputs, direction, "cpu")
    for name, x in want.items():
        assert (x is None) == (got[name] is None)
        assert x is None or not differ(x, got[name]), name


@pytest.mark.parametrize("direction", [*testing.PASSES, *testing.DERIVATIVES])
@pytest.mark.parametrize("case", SMALL[::4], ids=str)
def test_host_callback_equals_reference(case: Case, direction: str) -> None:
    """A backend that is not the CPU engine is called on the host, from a compiled program too."""
    if case.stored and direction in testing.DERIVATIVES:
        return
    inputs = testing.make_inputs(case)
    got = jax_arrays.compute(inputs, direction, "numpy", jit=True)
    assert not testing.compare(testing.expected(inputs, direction), got)
