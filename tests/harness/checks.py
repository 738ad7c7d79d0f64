"""Calls of a backend on the arrays of a case, the comparison with float64, and the check of refusals."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition import passes
from anyattn.runtime import dispatch
from harness.backends import Engine

PASSES = {pass_.name: pass_ for pass_ in passes.PASSES}


def run(inputs: testing.CaseInputs, direction: str, engine: Engine) -> testing.Results:
    """Return the backend's results by name, after a check of their dtypes, shapes and strides."""
    got = testing.compute(inputs, direction, engine.backend)
    assert not testing.malformed(inputs, got)
    return got


def wrong(inputs: testing.CaseInputs, direction: str, engine: Engine) -> list[str]:
    """Return [], or a line for each result of the backend that is farther from float64 than its budget."""
    return testing.compare(testing.expected(inputs, direction), run(inputs, direction, engine))


def refused(inputs: testing.CaseInputs, direction: str, engine: Engine) -> bool:
    """Return whether the backend refuses the problem. If it does, check that the call raises these reasons."""
    backend, (problem, _) = dispatch.get(engine.backend), inputs.describe(PASSES[direction])
    reasons = dispatch.refuse(backend, problem)
    if not reasons:
        return False
    assert engine.may_refuse(problem), f"{engine} must compute this: {reasons}"
    with pytest.raises(anyattn.UnsupportedProblem) as caught:
        run(inputs, direction, engine)
    # The call first computes the forward pass, so a refused forward pass raises its own reasons.
    reported, reasons = (
        caught.value.refusals[engine.backend],
        [*reasons, *dispatch.refuse(backend, inputs.describe()[0])],
    )
    assert reported and set(reported) <= set(reasons)
    return True


def bits(array: np.ndarray) -> np.ndarray:
    """Return a view of the array's bytes, in which NaN equals NaN and 0 differs from -0."""
    return array.view(np.uint8)
