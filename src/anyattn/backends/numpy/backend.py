"""NumpyBackend: every problem whose arrays lie in host memory."""

from __future__ import annotations

import numpy as np

from ... import reference
from ...dtypes import narrow, raw
from ...kvcache import ARRAYS, Append
from ...problem import Problem
from ..base import Call
from .attention import backward, forward
from .tiles import Arrays

EVIDENCE = {"tested": ("anything with NumPy",)}


class NumpyPlan:
    """Temporaries come from NumPy, so there is no workspace."""

    forward_bytes = 0
    backward_bytes = 0

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

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

    def available(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> list[str]:
        if problem.device != "cpu":
            return [f"computes in host memory only; q is on {problem.device}"]
        return []

    def plan(self, problem: Problem) -> NumpyPlan:
        return NumpyPlan(problem)

    def append(self, append: Append, call: Call) -> None:
        given = {name: getattr(call, name) for name in ARRAYS}
        arrays = {name: None if array is None else call.adapter.numpy(array) for name, array in given.items()}
        q = reference.append(append, arrays)
        if q is not None:
            out = raw(call.adapter.numpy(call.out), append.q.dtype)
            out[...] = narrow(q, append.q.dtype)
