"""Registration of the native library with threadpoolctl, which limits threads of scikit-learn, joblib and dask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Native(Protocol):
    """Functions of the native library that a controller needs."""

    def num_threads(self) -> int: ...
    def restore_num_threads(self, count: int) -> None: ...
    def version(self) -> int: ...
    def thread_runtime(self) -> str: ...


def register_with_threadpoolctl(open_library: Callable[[str], Native]) -> None:
    """Register a controller for the library, if threadpoolctl is installed; a second call replaces the first."""
    try:
        import threadpoolctl
    except ImportError:
        return
    threadpoolctl.register(_controller(threadpoolctl.LibController, open_library))


def _controller(base: Any, open_library: Callable[[str], Native]) -> Any:
    class AnyattnController(base):  # type: ignore[misc]
        """Controller of the CPU engine's number of threads, for any of its thread pools."""

        user_api = "anyattn"
        internal_api = "anyattn"
        filename_prefixes = ("libanyattn", "anyattn")
        check_symbols = ("anyattn_num_threads", "anyattn_set_num_threads")

        def get_num_threads(self) -> int:
            return open_library(self.filepath).num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            open_library(self.filepath).restore_num_threads(num_threads)

        def get_version(self) -> str:
            version = open_library(self.filepath).version()
            return f"{version >> 16}.{version >> 8 & 0xFF}"

        def set_additional_attributes(self) -> None:
            self.threading_layer = open_library(self.filepath).thread_runtime()

    return AnyattnController
