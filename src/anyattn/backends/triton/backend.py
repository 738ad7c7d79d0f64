"""Triton backend: runs on a GPU through torch's device, or in Triton's interpreter on host memory."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from ...definition.passes import APPEND, BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT
from ...definition.problem import Problem
from ..base import without_paged_gradients, without_starts
from . import score_limits
from .device import DEVICES, LARGEST_HEAD_DIM, cards, installed, interpreted, largest_head_dim, refusal

if TYPE_CHECKING:
    from .plan import TritonPlan

OLDEST = (3, 6)
# Optional arrays that the kernels read.
EXTRAS = (
    *("bias", "mask", "alibi_slopes", "sink", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
    *("leftpad_k", "offset", "block_table", "cache_batch_idx", "rng_state"),
    *("captured", "captured_indices", "k_scale", "v_scale"),
)
# Evidence for each card, for `anyattn info`. Compiled: see the tests' aot.json. Expected: no known failure.
EVIDENCE = {
    "tested": ("Triton's interpreter",),
    "compiled": (
        *("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
        *("gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201"),
    ),
    "expected": ("other cards of NVIDIA and AMD", "Intel's (xpu)"),
}


class TritonBackend:
    """Backend for NVIDIA, AMD and Intel GPUs."""

    name = "triton"
    passes = frozenset((FORWARD, BACKWARD, TANGENT, SECOND, FORWARD_TANGENT, APPEND))
    score_functions = frozenset((FORWARD, BACKWARD))
    extras = frozenset(EXTRAS)
    may_fail = False

    def available(self, *, named: bool = False) -> str | None:
        if self._missing is None and interpreted() and not named:
            return "runs in Triton's interpreter, which is slow. Name it to use it"
        return self._missing

    @cached_property
    def _missing(self) -> str | None:
        found = installed()
        if found is None:
            return "Triton is not installed: pip install triton (it comes with torch for GPUs)"
        if found < OLDEST:
            had, needed = (".".join(map(str, numbers)) for numbers in (found, OLDEST))
            return f"Triton {had} is too old: {needed} or later is needed (torch 2.10 includes it)"
        if interpreted():
            return None
        try:
            import torch
        except ImportError:
            return "torch, through which GPUs are reached, is not installed"
        if not any(hasattr(torch, kind) and getattr(torch, kind).is_available() for kind in DEVICES):
            return "torch finds no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"
        return None

    def supports(self, problem: Problem) -> list[str]:
        reasons = _misplaced(problem.device) + _without(problem.dtype)
        if problem.pass_ is APPEND:
            return reasons
        reasons = (reasons or _too_wide(problem)) + score_limits.limits(problem)
        return reasons + without_paged_gradients(problem) + without_starts(problem)

    def avoids(self, problem: Problem) -> list[str]:
        return []

    def plan(self, problem: Problem) -> TritonPlan:
        from .plan import TritonPlan

        return TritonPlan(problem)


def list_gpus() -> list[dict[str, str]]:
    """Return what is known about each GPU of this machine, for `anyattn info`."""
    return [{"device": name, "name": product, "arch": arch, "state": state(arch)} for name, product, arch in cards()]


def state(arch: str) -> str:
    """Return "compiled", "expected", or why Triton cannot run on the architecture."""
    return refusal(arch) or ("compiled" if arch in EVIDENCE["compiled"] else "expected")


def _misplaced(where: str) -> list[str]:
    """Return why arrays on this device are not supported, or []."""
    if interpreted():
        return [] if where == "cpu" else [f"computes in host memory because TRITON_INTERPRET is set, got q on {where}"]
    if where.split(":", maxsplit=1)[0] not in DEVICES:
        return [f"computes on {' and '.join(DEVICES)} devices, got q on {where}"]
    against = [refusal(arch) for name, _, arch in cards() if name == where]
    return [reason for reason in against if reason]


def _too_wide(problem: Problem) -> list[str]:
    arch = next((arch for name, _, arch in cards() if name == problem.device), "")
    largest = largest_head_dim(arch, problem.dtype, problem.pass_)
    width = max(problem.head_dim, problem.head_dim_v)
    if width <= largest:
        return []
    what = "second derivatives" if problem.pass_ is SECOND else "gradients"
    where = "" if largest == LARGEST_HEAD_DIM else f" for {problem.dtype} {what} on {arch}"
    return [f"supports head_dim and head_dim_v up to {largest}{where}, got {width}"]


def _without(dtype: str) -> list[str]:
    return ["has no float64; use the cpu or numpy backend"] if dtype == "float64" else []
