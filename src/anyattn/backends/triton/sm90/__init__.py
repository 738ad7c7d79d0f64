"""Kernels for Hopper (sm_90) in Gluon, Triton's lower-level language. A plan uses them instead of portable kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....config import settings
from ....definition.problem import Problem
from ..device import device

if TYPE_CHECKING:
    from ..launch import Kernel

ARCH = "sm_90"


def reason_off() -> str | None:
    """Return why these kernels are not used, or None. They are off by default because no GPU has run them yet."""
    if not settings.current().hopper:
        return "off, because no GPU has run them yet (ANYATTN_HOPPER=1 enables them)"
    try:
        from . import dialect  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"off, because this version of Triton has no supported Gluon ({error})"
    return None


def replace_portable(portable: Kernel, problem: Problem) -> Kernel:
    """Return a Hopper kernel for a forward problem that one supports, otherwise the portable kernel."""
    if device(problem.device).arch != ARCH or reason_off():
        return portable
    from . import plan

    return portable if plan.unsupported_reasons(problem) else plan.forward_kernel(problem, portable)
