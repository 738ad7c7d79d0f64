"""NumPy backend: every problem whose arrays are in host memory."""

from __future__ import annotations

import numpy as np

from ...definition.passes import APPEND, BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT
from ...definition.problem import Problem
from ..base import Call, Plan, forward_and_tangent
from ..host_append import HostAppendPlan
from .attention import backward, forward
from .derivatives import second, tangent
from .tiles import Arrays

EVIDENCE = {"tested": ("anything with NumPy",)}
# Optional arrays that the kernels read.
EXTRAS = (
    *("bias", "mask", "alibi_slopes", "sink", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
    *("leftpad_k", "offset", "block_table", "cache_batch_idx", "kv_indices", "rng_state"),
    *("captured", "captured_indices", "k_scale", "v_scale"),
)
COMPUTE = {FORWARD: forward, BACKWARD: backward, TANGENT: tangent, SECOND: second}


class NumpyPlan:
    """Plan without workspace, because NumPy allocates temporaries."""

    workspace_bytes = 0
    lse_optional = False

    def __init__(self, problem: Problem) -> None:
        self.problems = forward_and_tangent(problem) if problem.pass_ is FORWARD_TANGENT else (problem,)

    def warmup(self) -> None:
        """Do nothing, because nothing has to be compiled."""

    # No warnings for the caller's NaN and infinities, as in every backend.
    @np.errstate(all="ignore")
    def run(self, call: Call) -> None:
        for problem in self.problems:
            COMPUTE[problem.pass_](Arrays(problem, call))


class NumpyBackend:
    """Backend that is slower than the CPU engine, but available everywhere."""

    name = "numpy"
    passes = frozenset((*COMPUTE, FORWARD_TANGENT, APPEND))
    score_functions = frozenset((*COMPUTE, FORWARD_TANGENT))
    extras = frozenset(EXTRAS)
    may_fail = False

    def available(self, *, named: bool = False) -> str | None:
        return None

    def supports(self, problem: Problem) -> list[str]:
        if problem.device == "cpu":
            return []
        verb = "writes to" if problem.pass_ is APPEND else "computes in"
        return [f"{verb} host memory only, got q on {problem.device}"]

    def avoids(self, problem: Problem) -> list[str]:
        return []

    def plan(self, problem: Problem) -> Plan:
        return HostAppendPlan(problem) if problem.pass_ is APPEND else NumpyPlan(problem)
