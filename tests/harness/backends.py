"""Every engine that this machine can run: each backend, and the native one once per instruction set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from anyattn.backends.triton.device import interpreted
from anyattn.config import settings
from anyattn.definition.problem import Problem
from anyattn.runtime import dispatch
from anyattn.testing import Case
from harness.cases import INTERPRETED_ENTRIES, small

WIDEST = {"triton": 512, "vulkan": 256}  # head_dim of the backends for GPUs


@dataclass(frozen=True, slots=True)
class Engine:
    """A backend, and the instruction set of the native one."""

    backend: str
    target: str = ""

    @property
    def interpreted(self) -> bool:
        """A tile takes milliseconds."""
        return self.backend == "triton" and interpreted()

    def may_refuse(self, problem: Problem) -> bool:
        """What no engine of this kind computes."""
        if problem.dout is not None and (problem.paged or problem.cache_batch_idx is not None):
            return self.backend != "numpy"
        widest = WIDEST.get(self.backend)
        too_wide = widest is not None and max(problem.head_dim, problem.head_dim_v) > widest
        return too_wide or not self.computes(problem.dtype)

    def computes(self, dtype: Any) -> bool:
        """GPUs compute float64 slowly or not at all."""
        return self.backend not in WIDEST or dtype != "float64"

    def too_slow_for(self, case: Any) -> bool:
        return self.interpreted and isinstance(case, Case) and not small([case], INTERPRETED_ENTRIES)

    def __str__(self) -> str:
        return f"{self.backend}-{self.target}" if self.target else self.backend

    def use(self, threads: int = 0) -> None:
        """Makes this engine's settings those in force; plans are forgotten only where something changes."""
        wanted = {"ANYATTN_CPU_TARGET": self.target, "ANYATTN_NUM_THREADS": str(threads)}
        if any(os.environ.get(name, "") != value for name, value in wanted.items()):
            os.environ.update(wanted)
            settings.reload()


@cache
def engines() -> tuple[Engine, ...]:
    """A backend that ANYATTN_REQUIRE names and that is not there is an error, never a shorter list."""
    found = []
    for name in dispatch.names():
        missing = dispatch.get(name).available(named=True)
        if missing and name in settings.current().require:
            raise RuntimeError(f"ANYATTN_REQUIRE names {name}, which is not available: {missing}")
        if not missing:
            found += [Engine(name, target) for target in cpu_targets()] if name == "cpu" else [Engine(name)]
    return tuple(found)


def skip_module_without(backend: str) -> None:
    """Skips the module that calls this where the backend is missing or too old, unless ANYATTN_REQUIRE names it."""
    missing = dispatch.get(backend).available(named=True)
    if missing and backend not in settings.current().require:
        pytest.skip(f"{missing}, and ANYATTN_REQUIRE does not ask for it", allow_module_level=True)


def cpu_targets() -> list[str]:
    """Instruction sets of the native library that this machine runs, best first."""
    from anyattn.backends.cpu import library

    return library.load().targets()
