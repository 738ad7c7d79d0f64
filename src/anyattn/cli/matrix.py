"""Matrix of problems for `verify`: one case per feature and dtype, on every backend of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from .. import testing
from ..config import settings
from ..definition.accuracy import Expected
from ..definition.errors import UnsupportedProblem
from ..runtime import dispatch


@dataclass(frozen=True, slots=True)
class Engine:
    """Backend under test; `target` is the instruction set that the CPU engine must use."""

    backend: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.backend} {self.target}".strip()

    @contextmanager
    def activate(self) -> Iterator[None]:
        variable = settings.VARIABLES["cpu_target"][0]
        before = os.environ.get(variable)
        if self.target:
            os.environ[variable] = self.target
            settings.reload()
        try:
            yield
        finally:
            if self.target:
                os.environ.pop(variable) if before is None else os.environ.update({variable: before})
                settings.reload()


@dataclass(slots=True)
class Outcome:
    """Result of one problem on one backend.

    forward, backward: largest error relative to its budget; None: not compared.
    """

    engine: str
    dtype: str
    name: str
    forward: float | None = None
    backward: float | None = None
    refused: str = ""
    mismatches: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def compare(self, expected: Mapping[str, Expected], got: testing.Results) -> float:
        """Record wrong results, and return the largest error relative to its budget."""
        self.mismatches += testing.compare(expected, got)
        return max(testing.share(want, got[name]) for name, want in expected.items())


def engines(backend: str | None) -> tuple[list[Engine], dict[str, str]]:
    """Return the backends that run on this machine, and why the others cannot."""
    found: list[Engine] = []
    absent: dict[str, str] = {}
    for name in (backend,) if backend else dispatch.names():
        why = dispatch.get(name).available(named=bool(backend))
        if why:
            absent[name] = why
        elif name == "cpu":
            found.extend(Engine(name, target) for target in cpu_targets())
        else:
            found.append(Engine(name))
    return found, absent


def cpu_targets() -> list[str]:
    """Return the instruction sets that this machine and the library support."""
    from ..backends.cpu import library

    return library.load().targets()


def missing_dtypes() -> dict[str, str]:
    if testing.has_dtype("bfloat16"):
        return {}
    return {"bfloat16": "it needs ml_dtypes, which is not installed"}


def outcomes(found: list[Engine], seed: int) -> Iterator[Outcome]:
    """Compute each case once in float64, then with every backend."""
    dtypes = [name for name in testing.DTYPES if testing.has_dtype(name)]
    for case in testing.feature_cases(seed, dtypes):
        inputs = testing.make_inputs(case)
        expected = {name: testing.expected(inputs, name) for name in testing.PASSES}
        for engine in found:
            with engine.activate():
                yield ask(engine, inputs, expected)


def ask(engine: Engine, inputs: testing.CaseInputs, expected: Mapping[str, Mapping[str, Expected]]) -> Outcome:
    """Compute both passes. A refused pass is not compared, and an exception is a mismatch."""
    outcome = Outcome(str(engine), inputs.case.dtype, inputs.case.name)
    start = time.perf_counter()
    name, before = "forward", inputs.bytes()
    try:
        for name in testing.PASSES:
            got = testing.compute(inputs, name, engine.backend)
            outcome.mismatches += testing.malformed(inputs, got)
            setattr(outcome, name, outcome.compare(expected[name], got))
    except UnsupportedProblem as refusal:
        outcome.refused = f"{name}: {'; '.join(refusal.refusals[engine.backend])}"
    except Exception as error:  # recorded as a finding, so that the run continues
        outcome.mismatches.append(f"{type(error).__name__}: {error}")
    if inputs.bytes() != before:
        outcome.mismatches.append("an input, or memory around it, was written")
    outcome.seconds = time.perf_counter() - start
    return outcome
