"""The plan of a problem: its kernels in the order in which they run, and their workspace."""

from __future__ import annotations

from ...definition.problem import Problem
from ..base import Call
from .arguments import precision
from .launch import Kernel, run_all, warmup_all
from .plan_forward import forward_kernels

OPTIONAL = frozenset(("dbias", "dsink"))  # results that a call may not want


class TritonPlan:
    """The kernels of one problem, in the order in which they run."""

    lse_optional = False

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        kernels, needed = self._build()
        self._built = {precision(problem): kernels}
        self.forward_bytes, self.backward_bytes = (needed, 0) if problem.dout is None else (0, needed)
        warmup_all([kernel for kernel in kernels if not kernel.template.names & OPTIONAL], problem.device)

    def warmup(self) -> None:
        warmup_all(self._kernels(), self._problem.device)

    def forward(self, call: Call) -> None:
        run_all(self._kernels(), call, self._problem.device)

    def backward(self, call: Call) -> None:
        wanted = [
            kernel
            for kernel in self._kernels()
            if all(getattr(call, name) is not None for name in kernel.template.names & OPTIONAL)
        ]
        run_all(wanted, call, self._problem.device)

    def _kernels(self) -> list[Kernel]:
        """For the precision of float32 products that is in force."""
        now = precision(self._problem)
        if now not in self._built:
            self._built[now], _ = self._build()
        return self._built[now]

    def _build(self) -> tuple[list[Kernel], int]:
        if self._problem.dout is None:
            return forward_kernels(self._problem)
        from .plan_backward import backward_kernels

        return backward_kernels(self._problem)
