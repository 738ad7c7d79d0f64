"""Backends of this machine, the CPU engine once per instruction set, and the problems that each may refuse.

An `Engine` is a backend and, for the `cpu` backend, an instruction set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from anyattn.backends.triton.device import interpreted
from anyattn.config import settings
from anyattn.definition.passes import BACKWARD, FORWARD_TANGENT, SECOND, TANGENT
from anyattn.definition.problem import Problem
from anyattn.runtime import dispatch


@dataclass(frozen=True, slots=True)
class MayRefuse:
    """Limits of a backend that the tests accept."""

    head_dim: int  # a larger head_dim or head_dim_v may be refused
    dtypes: tuple[str, ...]
    extras: tuple[str, ...] = ()


# Written down here instead of read from `supports`, so that an unintended refusal fails a test.
MAY_REFUSE = {
    "triton": MayRefuse(512, ("float64",), ("kv_indices",)),
    "vulkan": MayRefuse(256, ("float64",), ("kv_indices", "k_scale")),
}


COMPUTES_FUNCTIONS = ("cpu", "numpy", "triton", "vulkan")  # backends of score_mod and mask_mod
ADDS_CAPTURED = ("cpu", "numpy", "triton")  # backends of the gradients of captured arrays
DERIVES = ("cpu", "numpy", "triton")  # backends of tangents and second derivatives
DERIVES_FUNCTIONS = ("cpu", "numpy")  # backends of these with score_mod and mask_mod


@dataclass(frozen=True, slots=True)
class Engine:
    """Backend and, for the `cpu` backend, its instruction set."""

    backend: str
    target: str = ""

    @property
    def interpreted(self) -> bool:
        """Return whether Triton's interpreter runs the kernels, which takes milliseconds for a tile."""
        return self.backend == "triton" and interpreted()

    def may_refuse(self, problem: Problem) -> bool:
        """Return whether the tests accept that this backend refuses the problem."""
        if problem.pass_ in (TANGENT, SECOND, FORWARD_TANGENT) and self.backend not in DERIVES:
            return True
        if problem.pass_ in (BACKWARD, SECOND) and (problem.paged or problem.cache_batch_idx is not None):
            return self.backend != "numpy"
        if problem.pass_ is BACKWARD and problem.quantised and self.backend not in ("numpy", "triton"):
            return True
        captures = any(array.gradient for array in problem.functions.arrays)
        if problem.pass_ is BACKWARD and captures and self.backend not in ADDS_CAPTURED:
            return True
        limits = MAY_REFUSE.get(self.backend)
        if limits is None:
            return False
        too_wide = max(problem.head_dim, problem.head_dim_v) > limits.head_dim
        return too_wide or problem.dtype in limits.dtypes or any(name in problem.arrays for name in limits.extras)

    def computes(self, dtype: Any) -> bool:
        """Return whether the backend must compute this dtype."""
        return self.backend not in MAY_REFUSE or dtype not in MAY_REFUSE[self.backend].dtypes

    def __str__(self) -> str:
        return f"{self.backend}-{self.target}" if self.target else self.backend

    def use(self, threads: int = 0) -> None:
        """Set this engine's environment variables. Cached plans are discarded only if a variable changes."""
        wanted = {"ANYATTN_CPU_TARGET": self.target, "ANYATTN_NUM_THREADS": str(threads)}
        if any(os.environ.get(name, "") != value for name, value in wanted.items()):
            os.environ.update(wanted)
            settings.reload()


@cache
def engines() -> tuple[Engine, ...]:
    """Return the engines of this machine. Raise RuntimeError if a backend that ANYATTN_REQUIRE names is missing."""
    found = []
    for name in dispatch.names():
        missing = dispatch.get(name).available(named=True)
        if missing and name in settings.current().require:
            raise RuntimeError(f"ANYATTN_REQUIRE names {name}, which is not available: {missing}")
        if not missing:
            found += [Engine(name, target) for target in cpu_targets()] if name == "cpu" else [Engine(name)]
    return tuple(found)


def skip_module_without(backend: str) -> None:
    """Skip the calling module if the backend is missing or too old, unless ANYATTN_REQUIRE names the backend."""
    missing = dispatch.get(backend).available(named=True)
    if missing and backend not in settings.current().require:
        pytest.skip(f"{missing}, and ANYATTN_REQUIRE does not ask for it", allow_module_level=True)


def cpu_targets() -> list[str]:
    """Return the instruction sets of the native library that this machine supports, best first."""
    from anyattn.backends.cpu import library

    return library.load().targets()
