"""NumpyBackend: every problem whose arrays lie in host memory."""

from __future__ import annotations

import numpy as np

from ...definition.kvcache import Append
from ...definition.problem import Problem
from ..base import Call, append_on_host
from .attention import backward, forward
from .tiles import Arrays

EVIDENCE = {"tested": ("anything with NumPy",)}


class NumpyPlan:
    """Temporaries come from NumPy, so there is no workspace."""

    forward_bytes = 0
    backward_bytes = 0
    lse_optional = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def warmup(self) -> None:
        pass

    # NaN and infinities of the caller go through in silence, as on every backend
    @np.errstate(all="ignore")
    def forward(self, call: Call) -> None:
        forward(Arrays(self.problem, call))

    @np.errstate(all="ignore")
    def backward(self, call: Call) -> None:
        backward(Arrays(self.problem, call))


class NumpyBackend:
    """Slower than the native engine, but always there."""

    name = "numpy"
    may_fail = False

    def available(self, *, named: bool = False) -> str | None:
        return None

    def supports(self, problem: Problem) -> list[str]:
        if problem.device != "cpu":
            return [f"computes in host memory only; q is on {problem.device}"]
        return []

    def avoids(self, problem: Problem) -> list[str]:
        return []

    def plan(self, problem: Problem) -> NumpyPlan:
        return NumpyPlan(problem)

    def supports_append(self, append: Append) -> list[str]:
        return [] if append.q.device == "cpu" else [f"writes to host memory only; q is on {append.q.device}"]

    def append(self, append: Append, call: Call) -> None:
        append_on_host(append, call)
