"""Random problems, all features mixed, on every engine. `--hypothesis-profile=full` draws 2,000 of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from anyattn import testing
from anyattn.testing import Case, make_inputs
from harness.backends import Engine
from harness.checks import refused, wrong
from harness.selection import every_backend

pytestmark = every_backend()

LIMITS = testing.Limits(smallest=0, shortest=0, longest=200, head_dim=128, scores=2**16)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Draw any call that is allowed; hypothesis makes the choices, so that it can look for simpler ones that fail."""
    return testing.random_case(draw(st.randoms(use_true_random=False)), LIMITS)


@given(case=problems())
def test_random_problems_equal_the_reference(engine: Engine, case: Case) -> None:
    if not engine.computes(case.dtype):
        case = replace(case, dtype="float32", bias_dtype="")
    inputs = make_inputs(case)
    before = inputs.bytes()
    for direction in testing.PASSES:
        assert refused(inputs, direction, engine) or not wrong(inputs, direction, engine)
    assert inputs.bytes() == before, "an input, or memory around it, was written"
