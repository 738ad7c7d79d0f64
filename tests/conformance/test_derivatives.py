"""Tangents and second derivatives: the definition against torch's float64 autograd, and every backend against it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition import derivatives
from anyattn.definition.accuracy import Expected
from anyattn.testing import Case, CaseInputs, make_inputs
from harness import oracle
from harness.backends import DERIVES, Engine
from harness.cases import DIFFERENTIABLE, SMALL, named
from harness.checks import refused, run
from harness.selection import every_backend

SHORT = [case for case in SMALL if not case.stored]


@lru_cache(maxsize=2)
def inputs_of(case: Case) -> CaseInputs:
    return make_inputs(case)


@lru_cache(maxsize=4)
def expected(case: Case, direction: str) -> dict[str, Expected]:
    """Return what the definition computes, once for all engines, because it takes longer than they do."""
    return testing.expected(inputs_of(case), direction)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_definition_equals_double_autograd(case: Case) -> None:
    inputs = make_inputs(case)
    problem, arrays = inputs.describe()
    got: dict[str, Any] = derivatives.second(problem, arrays, inputs.dout64, inputs.dlse64, inputs.tangents64)
    tout, tlse = derivatives.tangent(problem, arrays, inputs.tangents64)
    assert np.array_equal(tout, got["ddout"]) and np.array_equal(tlse, got["ddlse"])
    for name, want in oracle.second(inputs).items():
        if want is None:
            assert name not in got
            continue
        largest = np.abs(want).max(initial=1.0)
        np.testing.assert_allclose(got[name].reshape(want.shape), want, rtol=0, atol=1e-10 * largest, err_msg=name)


@every_backend(refusals=True)
@pytest.mark.parametrize("direction", testing.DERIVATIVES)
def test_backends_without_the_pass_refuse_it(direction: str, engine: Engine) -> None:
    assert refused(make_inputs(named("plain")), direction, engine) == (engine.backend not in DERIVES)


def is_repeated(engine: Engine, case: Case, direction: str) -> bool:
    """Return whether Triton's interpreter repeats the forward and the tangent pass, which compute both together."""
    return engine.interpreted and direction == "forward_tangent" and case not in SHORT[::4]


@every_backend(interpreter=True, refusals=True, only=DERIVES, full_if=is_repeated)
@pytest.mark.parametrize("direction", testing.DERIVATIVES)
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_derivatives_equal_definition(case: Case, direction: str, engine: Engine) -> None:
    inputs = inputs_of(case)
    if refused(inputs, direction, engine):
        return
    before = inputs.bytes()
    got = run(inputs, direction, engine)
    assert inputs.bytes() == before
    assert not testing.compare(expected(case, direction), got)


@every_backend(only=DERIVES)
@pytest.mark.parametrize("direction", testing.DERIVATIVES)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_absent_tangents_are_zeros(case: Case, direction: str, engine: Engine) -> None:
    inputs = make_inputs(case)
    if refused(inputs, direction, engine):
        return
    given = {**inputs.arguments, "backend": engine.backend}
    zeros = {f"t{name}": np.zeros_like(given[name]) for name in ("q", "k", "v", "bias", "sink") if name in given}
    some = {**zeros, **inputs.tangents}
    saved = (
        {}
        if direction == "forward_tangent"
        else dict(zip(("out", "lse"), anyattn.attention_forward(**given), strict=True))
    )
    saved |= {"dout": inputs.dout, "dlse": inputs.dlse} if direction == "second" else {}
    function = getattr(anyattn, f"attention_{direction}")
    for absent, want in (({}, zeros), (inputs.tangents, some)):
        results = [function(**saved, **tangents, **given) for tangents in (absent, want)]
        for got, expected in zip(*results, strict=True):
            assert (got is None and expected is None) or np.array_equal(got, expected, equal_nan=True)


def arguments(**changes: Any) -> dict[str, Any]:
    x = np.ones((1, 4, 2, 8), np.float32)
    return {"q": x, "k": x, "v": x, "out": x, "lse": np.ones((1, 2, 4), np.float32), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tq": np.ones((1, 3, 2, 8), np.float32)}, ValueError, r"tq must have the shape \(1, 4, 2, 8\) of q"),
        ({"tv": np.ones((1, 4, 2, 8))}, TypeError, "tv must be float32, got float64"),
        ({"tbias": np.ones((1, 1, 4, 4), np.float32)}, ValueError, "tbias must be None without bias"),
        ({"tsink": np.ones(2, np.float32)}, ValueError, "tsink must be None without sink"),
        ({"lse": np.ones((1, 4, 2), np.float32)}, ValueError, "lse must have shape"),
        ({"tmask": np.ones(4, bool)}, TypeError, "attention_tangent.. got an unexpected keyword argument 'tmask'"),
    ],
)
def test_wrong_tangents_are_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        anyattn.attention_tangent(**arguments(**changes))


def test_memory_grows_with_the_length_only() -> None:
    """Neither pass makes an array of O(N^2): 8,192 queries and keys would take 256 MiB in float32."""
    import tracemalloc

    rng = np.random.default_rng(0)
    q, k, v, tq, dout = (rng.standard_normal((1, 8192, 1, 8), dtype=np.float32) for _ in range(5))
    given = {"window": (200, 0), "backend": "numpy"}
    out, lse = anyattn.attention_forward(q, k, v, **given)
    tracemalloc.start()
    anyattn.attention_tangent(q, k, v, out, lse, tq=tq, **given)
    anyattn.attention_second(dout, q, k, v, out, lse, tq=tq, **given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_gradients_of_a_case_without_tangents_are_zero() -> None:
    inputs = make_inputs(named("plain"))
    out, lse = anyattn.attention_forward(**inputs.arguments, backend="numpy")
    found = anyattn.attention_second(inputs.dout, out=out, lse=lse, **inputs.arguments, backend="numpy")
    assert all(x is None or not np.any(x) for x in found)
