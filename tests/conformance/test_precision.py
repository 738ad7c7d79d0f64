"""`precision="fast"`: errors within its bound on tiles, and the bits of "exact" everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.config import settings
from anyattn.testing import Case, expected_results, make_inputs
from harness.backends import Engine
from harness.selection import every_backend

pytestmark = every_backend()

CASE = Case("precision", batch=1, seqlen_q=150, seqlen_k=170, head_dim=64, head_dim_v=40, causal=True)
INPUTS = make_inputs(CASE)
ARGUMENTS = {name: INPUTS.arguments[name] for name in ("q", "k", "v", "causal")}


def results(engine: Engine, precision: str | None) -> dict[str, np.ndarray]:
    flags: dict[str, Any] = {"backend": engine.backend, "precision": precision}
    out, lse = anyattn.attention_forward(**ARGUMENTS, **flags)
    gradients = anyattn.attention_backward(INPUTS.dout, **ARGUMENTS, out=out, lse=lse, **flags)
    return {"out": out, "lse": lse, "dq": gradients.dq, "dk": gradients.dk, "dv": gradients.dv}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.fixture
def fast_by_setting(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Iterator[None]:
    monkeypatch.setenv("ANYATTN_PRECISION", "fast")
    settings.reload()
    yield
    monkeypatch.undo()
    settings.reload()


def test_fast_changes_results_on_tiles_alone(engine: Engine) -> None:
    assert same(results(engine, "fast"), results(engine, "exact")) == ("amx" not in engine.target)


def test_errors_of_fast_products_are_those_of_sixteen_bits(engine: Engine) -> None:
    """Compare with a bound on the absolute values of every term.

    Every factor of a product has a relative error of 2^-17 at most, and so has a product without its smallest part. A
    score's error, at most 2^-16 times its largest absolute value S, becomes a relative error of P. dS has the errors of
    P, of dP, and of delta, which is computed from out. So 4 S + 12 errors of 2^-17 add up at most.
    """
    q, k = (np.abs(ARGUMENTS[name].astype(np.float64)) for name in ("q", "k"))
    largest = np.einsum("bihd,bjhd->bhij", q, k).max() * CASE.head_dim**-0.5
    found = results(engine, "fast")
    expected = expected_results(ARGUMENTS, None) | expected_results(ARGUMENTS, INPUTS.dout)
    for name in ("out", "dq", "dk", "dv"):
        bound = 2.0**-17 * (4 * largest + 12) * expected[name].magnitude.max() + expected[name].budget
        assert expected[name].error(found[name]) <= bound, name


def test_argument_comes_before_the_setting(engine: Engine, fast_by_setting: None) -> None:
    exact, fast = results(engine, "exact"), results(engine, "fast")
    assert same(results(engine, None), fast)
    assert same(exact, fast) == ("amx" not in engine.target)
