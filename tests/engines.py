"""Every engine that this machine can run: each backend, and the native one once per instruction set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from anyattn import dispatch, settings


@dataclass(frozen=True, slots=True)
class Engine:
    """A backend, and the instruction set of the native one."""

    backend: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.backend}-{self.target}" if self.target else self.backend

    def computes(self, dtype: str) -> bool:
        """GPUs compute float64 slowly or not at all: the Vulkan backend refuses it."""
        return self.backend != "vulkan" or dtype != "float64"

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
    for name in dispatch.NAMES:
        missing = dispatch.get(name).available()
        if missing and name in settings.current().require:
            raise RuntimeError(f"ANYATTN_REQUIRE names {name}, which is not available: {missing}")
        if not missing:
            found += [Engine(name, target) for target in cpu_targets()] if name == "cpu" else [Engine(name)]
    return tuple(found)


def cpu_targets() -> list[str]:
    """Instruction sets of the native library that this machine runs, best first."""
    from anyattn.backends.cpu import library

    return library.load().targets()
