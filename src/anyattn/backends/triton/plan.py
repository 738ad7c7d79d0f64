"""Plan of a problem: its kernels in execution order, and their workspace."""

from __future__ import annotations

from ...definition.passes import APPEND, BACKWARD, FORWARD, FORWARD_TANGENT, TANGENT
from ...definition.problem import Problem
from ..base import Call, forward_and_tangent
from .arguments import precision
from .launch import Kernel, run_all, warmup_all

OPTIONAL = frozenset(("dbias", "dsink", "dcaptured"))  # outputs that may be absent from a call


class TritonPlan:
    """Kernels of one problem, in execution order."""

    lse_optional = False

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        kernels, self.workspace_bytes = build(problem)
        self._built = {precision(problem): kernels}
        warmup_all([kernel for kernel in kernels if not kernel.template.names & OPTIONAL], problem.device)

    def warmup(self) -> None:
        warmup_all(self._kernels(), self._problem.device)

    def run(self, call: Call) -> None:
        kernels = self._kernels()
        if self._problem.pass_ is BACKWARD:
            kernels = [kernel for kernel in kernels if _wanted(kernel, call)]
        run_all(kernels, call, self._problem.device)

    def _kernels(self) -> list[Kernel]:
        """Return the kernels for torch's current precision of float32 products."""
        now = precision(self._problem)
        if now not in self._built:
            self._built[now], _ = build(self._problem)
        return self._built[now]


def _wanted(kernel: Kernel, call: Call) -> bool:
    return all(getattr(call, name) is not None for name in kernel.template.names & OPTIONAL)


def build(problem: Problem) -> tuple[list[Kernel], int]:
    """Return the kernels of the problem's pass and their bytes of workspace. Only that pass is imported."""
    if problem.pass_ is FORWARD_TANGENT:
        parts = [build(part) for part in forward_and_tangent(problem)]
        return [kernel for kernels, _ in parts for kernel in kernels], max(used for _, used in parts)
    if problem.pass_ is FORWARD:
        from .plan_forward import forward_kernels

        return forward_kernels(problem)
    if problem.pass_ is APPEND:
        from .append import append_kernels

        return append_kernels(problem), 0
    if problem.pass_ is BACKWARD:
        from .plan_backward import backward_kernels

        return backward_kernels(problem)
    from .plan_derivatives import second_kernels, tangent_kernels

    return tangent_kernels(problem) if problem.pass_ is TANGENT else second_kernels(problem)
