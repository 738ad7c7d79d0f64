"""Kernels for Hopper (sm_90) in Gluon, Triton's lower-level language, behind the same plan as the portable ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....config import settings
from ....definition.problem import Problem
from ..device import device

if TYPE_CHECKING:
    from ..launch import Kernel

ARCH = "sm_90"


def missing() -> str | None:
    """Why these kernels are not used, or None. A path that no GPU has shown right is off."""
    if not settings.current().hopper:
        return "off, as no GPU has run them yet (ANYATTN_HOPPER=1 turns them on)"
    try:
        from . import dialect  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"off, as this Triton has no Gluon that they know ({error})"
    return None


def instead_of(portable: Kernel, problem: Problem) -> Kernel:
    """A Hopper kernel for a forward, wherever one takes it; the portable one elsewhere."""
    if device(problem.device).arch != ARCH or missing():
        return portable
    from . import plan

    return portable if plan.refusals(problem) else plan.forward_kernel(problem, portable)
