"""Calls of a backend on the arrays of a case, the float64 results with their error budgets, and the comparison."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn
from anyattn.definition import accuracy
from anyattn.runtime import dispatch
from harness.backends import Engine
from harness.inputs import Inputs

DIRECTIONS = ("forward", "backward")


def expected(inputs: Inputs, direction: str = "forward") -> dict[str, accuracy.Expected]:
    """Return the results in float64 by name, each with the largest error that a backend may make."""
    problem, arrays = inputs.canonical()
    if direction == "forward":
        return accuracy.expected_forward(problem, arrays)
    return accuracy.expected_backward(problem, arrays, inputs.dout64, inputs.dlse64)


def run(inputs: Inputs, direction: str, engine: Engine) -> dict[str, np.ndarray | None]:
    """Return the backend's results by name, after a check of their dtypes, shapes and strides."""
    case, given = inputs.case, inputs.arguments
    if direction == "forward":
        out, lse = anyattn.attention_forward(**given, backend=engine.backend)
        assert out.dtype == given["q"].dtype and lse.dtype == inputs.compute_dtype
        assert out.flags.c_contiguous and lse.flags.c_contiguous
        return {"out": out, "lse": lse}
    out, lse = inputs.saved(*anyattn.attention_forward(**given, backend=engine.backend))
    grads = anyattn.attention_backward(inputs.dout, out=out, lse=lse, dlse=inputs.dlse, **given, backend=engine.backend)
    got = grads._asdict()
    for name in ("q", "k", "v", "bias", "sink"):
        gradient, array = got[f"d{name}"], given.get(name)
        assert (gradient is None) == (array is None), name
        if array is not None:
            assert gradient.dtype == array.dtype and gradient.shape == array.shape and gradient.flags.c_contiguous, name
    if case.bias:
        got["dbias"] = got["dbias"].reshape((1,) * (4 - got["dbias"].ndim) + got["dbias"].shape)
    return got


def wrong(inputs: Inputs, direction: str, engine: Engine) -> list[str]:
    """Return [], or a line for each result of the backend that is farther from float64 than its budget."""
    return accuracy.check(expected(inputs, direction), run(inputs, direction, engine))


def refused(inputs: Inputs, direction: str, engine: Engine) -> bool:
    """Return True if the backend says that it does not compute this, after a check that the call raises its reasons."""
    backend, (problem, _) = dispatch.get(engine.backend), inputs.canonical(backward=direction == "backward")
    reasons = dispatch.refuse(backend, problem)
    if not reasons:
        return False
    assert engine.may_refuse(problem), f"{engine} must compute this: {reasons}"
    with pytest.raises(anyattn.UnsupportedProblem) as caught:
        run(inputs, direction, engine)
    reported = caught.value.refusals[engine.backend]  # a forward that is refused comes first, with its own reasons
    assert reported and set(reported) <= set(reasons)
    return True


def bits(array: np.ndarray) -> np.ndarray:
    """Return a view of the array's bytes: NaN equals NaN there, and 0 differs from -0."""
    return array.view(np.uint8)
