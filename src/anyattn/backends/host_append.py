"""Append to a cache in host memory by the definition, for backends without a kernel for it."""

from __future__ import annotations

from ..definition.passes import APPEND
from ..definition.problem import Problem
from .base import Call


class HostAppendPlan:
    """Plan of the APPEND pass on arrays in host memory."""

    workspace_bytes = 0
    lse_optional = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def warmup(self) -> None:
        """Do nothing, because nothing has to be compiled."""

    def run(self, call: Call) -> None:
        from ..definition import reference
        from ..definition.dtypes import narrow, raw

        given = {name: getattr(call, name) for name in APPEND.inputs}
        arrays = {name: None if array is None else call.adapter.numpy(array) for name, array in given.items()}
        q = reference.append(self.problem, arrays)
        if q is not None:
            dtype = self.problem.dtype
            raw(call.adapter.numpy(call.out), dtype)[...] = narrow(q, dtype)
