"""Exceptions of anyattn. Wrong arguments raise ValueError or TypeError; unsupported calls raise UnsupportedProblem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class CacheOverflow(ValueError, RuntimeError):
    """KV cache without space for the new keys of a call. Nothing was written. A RuntimeError too, as in flash_attn."""


class CompilationError(RuntimeError):
    """Failure to compile a kernel for this device. Automatic choice continues with the next backend."""


class DeviceError(RuntimeError):
    """Failure of a device during a valid call. Automatic choice continues with the next backend."""


class DeviceMemoryError(DeviceError, MemoryError):
    """Failure to allocate a call's arrays on a device."""


class UnsupportedProblem(NotImplementedError):
    """Valid call that no backend computes, or that the named backend does not compute. The message lists the reasons.

    Attributes:
        problem: description of the call.
        refusals: reasons by name of the backend.
    """

    def __init__(self, problem: str, refusals: Mapping[str, Sequence[str]]) -> None:
        self.problem = problem
        self.refusals = {name: tuple(reasons) for name, reasons in refusals.items()}
        lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.refusals.items()]
        names = tuple(self.refusals)
        head = f"backend {names[0]} does not compute" if len(names) == 1 else "no backend computes"
        super().__init__("\n".join([f"{head} {problem}", *lines]))

    def __reduce__(self) -> tuple[type[UnsupportedProblem], tuple[str, dict[str, tuple[str, ...]]]]:
        """Pickle the arguments, so that a process pool can pass the exception on."""
        return type(self), (self.problem, self.refusals)
