"""Checks of results against float64, within the budgets that `definition/accuracy.py` derives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import derivatives, explicit
from ..definition import accuracy, derivative_accuracy
from ..definition.accuracy import Expected
from ..definition.inputs import GRADIENTS
from ..definition.passes import BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT
from .arrays import make_inputs
from .cases import Case
from .inputs import CaseInputs

Results = dict[str, npt.NDArray[Any] | None]

PASSES = (FORWARD.name, BACKWARD.name)
DERIVATIVES = (TANGENT.name, SECOND.name, FORWARD_TANGENT.name)


def check(case: Case, backend: str | None = None, passes: Iterable[str] = PASSES) -> list[str]:
    """Compute a case; return one line for everything that is wrong, or [].

    Raises:
        UnsupportedProblem: the backend refuses the case.
    """
    inputs = make_inputs(case)
    before = inputs.bytes()
    lines = []
    for pass_name in passes:
        want = expected(inputs, pass_name)
        got = compute(inputs, pass_name, backend)
        lines += [f"{pass_name}: {line}" for line in malformed(inputs, got) or compare(want, got)]
    if inputs.bytes() != before:
        lines.append("an input, or memory around it, was written")
    return lines


def expected(inputs: CaseInputs, pass_name: str = FORWARD.name) -> dict[str, Expected]:
    """Compute the results of a pass in float64, each with the largest accepted error."""
    problem, arrays = inputs.describe()
    if pass_name == FORWARD.name:
        return accuracy.expected_forward(problem, arrays)
    if pass_name == TANGENT.name:
        return derivative_accuracy.expected_tangent(problem, arrays, inputs.tangents64)
    if pass_name == FORWARD_TANGENT.name:
        return expected(inputs, FORWARD.name) | expected(inputs, TANGENT.name)
    if pass_name == SECOND.name:
        saved = inputs.dout64, inputs.dlse64
        return derivative_accuracy.expected_second(problem, arrays, *saved, inputs.tangents64)
    return accuracy.expected_backward(problem, arrays, inputs.dout64, inputs.dlse64)


def compute(inputs: CaseInputs, pass_name: str, backend: str | None = None) -> Results:
    """Call the function of a pass, after `attention_forward` if it reads its results; return the results by name.

    Raises:
        UnsupportedProblem: the backend refuses the problem.
    """
    given = {**inputs.arguments, "backend": backend}
    along: dict[str, Any] = {**given, **inputs.tangents}
    if pass_name == FORWARD_TANGENT.name:
        results = derivatives.attention_forward_tangent(**along)
        return dict(zip(FORWARD_TANGENT.outputs, results, strict=True))
    out, lse = explicit.attention_forward(**given)
    if pass_name == FORWARD.name:
        return {"out": out, "lse": lse}
    out, lse = inputs.saved(out, lse)
    if pass_name == TANGENT.name:
        tout, tlse = derivatives.attention_tangent(out=out, lse=lse, **along)
        return {"tout": tout, "tlse": tlse}
    if pass_name == SECOND.name:
        found = derivatives.attention_second(inputs.dout, out=out, lse=lse, dlse=inputs.dlse, **along)
        return found._asdict()
    got: Results = explicit.attention_backward(inputs.dout, out=out, lse=lse, dlse=inputs.dlse, **given)._asdict()
    return got


def compare(expected: Mapping[str, Expected], got: Mapping[str, npt.NDArray[Any] | None]) -> list[str]:
    """Return one line for each result whose error exceeds its budget, or []."""
    return accuracy.check(expected, {name: _as_expected(want, got[name]) for name, want in expected.items()})


def malformed(inputs: CaseInputs, got: Mapping[str, npt.NDArray[Any] | None]) -> list[str]:
    """Return one line for each result that is missing, not contiguous, or of the wrong dtype or shape, or []."""
    given = inputs.arguments
    wanted = {f"d{x}": (given[x].dtype, given[x].shape) for x in ("q", "k", "v", *GRADIENTS) if x in given}
    if inputs.case.stored:
        del wanted["dk"], wanted["dv"]
    wanted |= dict.fromkeys(("out", "tout", "ddout"), (given["q"].dtype, inputs.dout.shape))
    wanted |= dict.fromkeys(("lse", "tlse", "ddlse"), (inputs.compute_dtype, inputs.lse_shape))
    lines = []
    for name, x in got.items():
        want = wanted.get(name)
        if x is None or want is None:
            lines += [f"{name} is missing"] if want else []
            lines += [f"{name} must be None, because the call has no such input"] if x is not None else []
        elif (x.dtype, x.shape) != want:
            lines.append(f"{name} must be {want[0]} {want[1]}, got {x.dtype} {x.shape}")
        elif not x.flags.c_contiguous:
            lines.append(f"{name} is not contiguous")
    return lines


def share(want: Expected, got: npt.NDArray[Any] | None) -> float:
    """Return the error of a result relative to its budget."""
    found = _as_expected(want, got)
    error = np.inf if found is None else want.error(found)
    return error / want.budget if want.budget else np.inf if error else 0.0


def _as_expected(want: Expected, got: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
    """Return a view with leading axes of size 1, which the gradient of a bias with fewer than four dimensions lacks."""
    return got if got is None else got[(None,) * (want.value.ndim - got.ndim)]
