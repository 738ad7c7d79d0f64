"""Choice of the backend: argument > context manager > environment > automatic. A named backend never falls back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest

import anyattn
from anyattn.backends.base import Backend, Plan
from anyattn.config import settings
from anyattn.definition.errors import CompilationError
from anyattn.definition.passes import FORWARD, Pass
from anyattn.definition.problem import Problem
from anyattn.runtime import dispatch

X = np.ones((1, 4, 2, 8), np.float32)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    settings.reload()
    yield
    settings.reload()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An available cpu backend that supports nothing."""

    def supports(problem: Problem) -> list[str]:
        return ["not today"]

    monkeypatch.setattr(dispatch.get("cpu"), "supports", supports)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cpu backend whose library did not build."""
    monkeypatch.delenv("ANYATTN_REQUIRE", raising=False)
    settings.reload()
    monkeypatch.setattr(dispatch.get("cpu"), "available", lambda **named: "no library")
    dispatch._warned.clear()


def served_by(monkeypatch: pytest.MonkeyPatch, **arguments: str) -> str:
    """Name of the backend whose plan the call gets."""
    planned: list[str] = []

    def spy(self: Backend, problem: Problem, plan=None) -> object:
        planned.append(self.name)
        return plan(self, problem)

    for name in dispatch.names():
        kind = type(dispatch.get(name))
        monkeypatch.setattr(kind, "plan", lambda self, problem, plan=kind.plan: spy(self, problem, plan))
    anyattn.attention(X, X, X, **arguments)
    return planned[-1]


def test_automatic_choice_is_the_first_backend_that_supports_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served_by(monkeypatch) == dispatch.available()[0]


def test_argument_overrides_context_manager_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_BACKEND", "cpu")
    settings.reload()
    assert dispatch.named(None) == ("cpu",)
    with anyattn.backend("numpy"):
        assert dispatch.named(None) == ("numpy",)
        assert dispatch.named("cpu") == ("cpu",)
    assert dispatch.named(None) == ("cpu",)


def test_cached_plan_is_dropped_when_the_choice_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    anyattn.attention(X, X, X)
    assert served_by(monkeypatch, backend="numpy") == "numpy"


@pytest.mark.usefixtures("refusing")
def test_automatic_choice_logs_a_skipped_backend_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._passed_over.clear()
    with caplog.at_level(logging.INFO, logger="anyattn"):
        anyattn.attention(X, X, X)
        anyattn.attention(X[:, :3], X, X)
    assert [record.message for record in caplog.records if "not today" in record.message] == [caplog.messages[0]]


@pytest.mark.usefixtures("refusing")
def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(anyattn.UnsupportedProblem, match="cpu: not today") as caught:
        anyattn.attention(X, X, X, backend="cpu")
    assert caught.value.refusals == {"cpu": ("not today",)}
    with anyattn.backend("cpu"), pytest.raises(anyattn.UnsupportedProblem):
        anyattn.attention(X, X, X)


def test_kernels_that_do_not_compile_are_skipped_unless_the_backend_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def plan(problem: Problem) -> None:
        raise CompilationError("attention_forward(TILE_Q=64): no registers left")

    monkeypatch.setattr(dispatch.get("cpu"), "plan", plan)
    with caplog.at_level(logging.WARNING, logger="anyattn"):
        anyattn.attention(X, X, X)
    assert caplog.messages == ["skipping backend cpu: attention_forward(TILE_Q=64): no registers left"]
    with pytest.raises(CompilationError, match="TILE_Q=64"):
        anyattn.attention(X, X, X, backend="cpu")
    monkeypatch.setattr(dispatch.get("numpy"), "supports", lambda problem: ["not today"])
    with pytest.raises(anyattn.UnsupportedProblem, match=r"(?s)cpu: .*TILE_Q=64.*numpy: not today"):
        anyattn.attention(X[:, :3], X, X)


@pytest.mark.usefixtures("missing")
def test_missing_library_warns_once_and_numpy_computes() -> None:
    with pytest.warns(RuntimeWarning, match="no library"):
        anyattn.attention(X, X, X)
    anyattn.attention(X[:, :2], X, X)


@pytest.mark.usefixtures("missing")
def test_missing_required_backends_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = dispatch.get("cpu")
    monkeypatch.setenv("ANYATTN_REQUIRE", "cpu")
    settings.reload()
    monkeypatch.setitem(dispatch._backends, "cpu", cpu)
    with pytest.raises(RuntimeError, match="ANYATTN_REQUIRE must name available backends, got cpu"):
        anyattn.attention(X, X, X)


def test_unknown_names_are_refused_with_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match="backend must be one of cpu, triton, vulkan, numpy, got 'cuda'"):
        anyattn.attention(X, X, X, backend="cuda")
    with pytest.raises(ValueError, match="got 'cuda'"), anyattn.backend("cuda"):
        pass


def test_explain_names_the_chosen_backend_and_the_reasons_of_the_others() -> None:
    explanation = anyattn.explain(X, X, X, causal=True)
    assert explanation.chosen == dispatch.available()[0]
    assert set(explanation.reasons) == set(dispatch.names())
    assert "float32" in str(explanation)


def test_invalid_settings_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_NUM_THREADS", "many")
    with pytest.raises(ValueError, match=r"ANYATTN_NUM_THREADS must be .*, got 'many'"):
        settings.reload()
    monkeypatch.delenv("ANYATTN_NUM_THREADS")


class Echo:
    """A backend of somebody else: it computes the forward pass with the NumPy backend."""

    name = "echo"
    passes = frozenset((FORWARD,))
    score_functions = frozenset[Pass]()
    extras = frozenset(("bias",))
    may_fail = False

    def available(self, *, named: bool = False) -> str | None:
        return None

    def supports(self, problem: Problem) -> list[str]:
        return []

    def avoids(self, problem: Problem) -> list[str]:
        return []

    def plan(self, problem: Problem) -> Plan:
        return dispatch.get("numpy").plan(problem)


@pytest.fixture
def echo() -> Iterator[None]:
    yield
    dispatch.unregister("echo")


@pytest.mark.usefixtures("echo")
def test_registered_backend_takes_its_place_in_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.register("echo", Echo, after="cpu")
    assert dispatch.names()[:2] == ("cpu", "echo")
    assert served_by(monkeypatch, backend="echo") == "numpy", "whose plan it takes"
    explanation = anyattn.explain(X, X, X, backend="echo")
    assert explanation.chosen == "echo"
    monkeypatch.setenv("ANYATTN_BACKEND", "echo")
    settings.reload()
    assert anyattn.explain(X, X, X).chosen == "echo", "it survives a reload of the settings"
    with pytest.raises(anyattn.UnsupportedProblem, match="echo: has no backward pass"):
        anyattn.attention_backward(X, X, X, X, X, np.zeros((1, 2, X.shape[1]), X.dtype))
    with pytest.raises(anyattn.UnsupportedProblem, match="backend echo does not compute float32 attention"):
        anyattn.attention(X, X, X, mask=np.ones((4, 4), bool))
    with pytest.raises(anyattn.UnsupportedProblem, match="echo: does not support mask"):
        anyattn.attention(X, X, X, mask=np.ones((4, 4), bool))
    dispatch.register("echo", Echo)
    assert dispatch.names()[-1] == "echo"


def test_register_refuses_unknown_arguments() -> None:
    with pytest.raises(ValueError, match="after must be one of cpu, triton, vulkan, numpy, got 'cuda'"):
        dispatch.register("echo", Echo, after="cuda")
    with pytest.raises(ValueError, match="after must be one of triton, vulkan, numpy, got 'cpu'"):
        dispatch.register("cpu", Echo, after="cpu")
    for name in ("cpu", "unknown"):
        with pytest.raises(ValueError, match=rf"name must be a backend added by register\(\) \(none\), got '{name}'"):
            dispatch.unregister(name)
