"""Exceptions of anyattn. Bad arguments raise ValueError or TypeError; a refusal by every backend is its own type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class CacheOverflow(ValueError, RuntimeError):
    """A KV cache has no room for the keys of a call; nothing was written. RuntimeError too, as flash_attn raises."""


class CompilationError(RuntimeError):
    """A backend's kernel does not compile for this device. Automatic choice goes on to the next backend."""


class DeviceError(RuntimeError):
    """A device failed in a call that was right. Automatic choice goes on to the next backend."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A device has no room for a call's arrays."""


class UnsupportedProblem(NotImplementedError):
    """No backend computes this problem: the call is valid, and the message lists each backend's reasons."""

    def __init__(self, problem: str, refusals: Mapping[str, Sequence[str]]) -> None:
        self.problem = problem
        self.refusals = {name: tuple(reasons) for name, reasons in refusals.items()}
        lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.refusals.items()]
        super().__init__("\n".join([f"no backend computes {problem}", *lines]))

    def __reduce__(self) -> tuple[type[UnsupportedProblem], tuple[str, dict[str, tuple[str, ...]]]]:
        """Pickle the arguments: a process pool must be able to pass the exception on."""
        return type(self), (self.problem, self.refusals)
