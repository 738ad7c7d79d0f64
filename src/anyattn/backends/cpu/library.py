"""Search and loading of the native library. A missing or broken library gives a reason, never a crash at import."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

from ...config import package, private_files, settings
from ...definition.dtypes import ATTENTION_DTYPES, DTYPES
from .layout import SIZE
from .signals import address_of
from .threadpool import register_with_threadpoolctl

VERSION = 0x000100
NAME = {"win32": "anyattn.dll", "darwin": "libanyattn.dylib"}.get(sys.platform, "libanyattn.so")
# anyattn_pass in anyattn.h
PASSES = {"forward": 0, "backward": 1, "append": 2, "tangent": 3, "second": 4, "forward_tangent": 5}


class LibraryError(RuntimeError):
    """Reason why the native library cannot be used."""


class Library:
    """C functions of a loaded library."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._dll = dll = ctypes.CDLL(path)
        call = [ctypes.c_void_p]
        self.passes = [getattr(dll, f"anyattn_{name}") for name in PASSES]
        for function in self.passes:
            function.argtypes, function.restype = call, ctypes.c_int32
        self.workspace = dll.anyattn_workspace
        self.workspace.argtypes, self.workspace.restype = [*call, ctypes.c_int32], ctypes.c_int64
        self.poll_python = address_of(dll.anyattn_poll_python)
        dll.anyattn_version.restype = dll.anyattn_call_size.restype = ctypes.c_uint32
        dll.anyattn_target_name.restype = dll.anyattn_target_reason.restype = ctypes.c_char_p
        dll.anyattn_error_string.restype = ctypes.c_char_p
        dll.anyattn_thread_runtime.restype = ctypes.c_char_p
        dll.anyattn_peak_flops.argtypes, dll.anyattn_peak_flops.restype = [ctypes.c_int32] * 3, ctypes.c_double

    def xla_handler(self) -> Any:
        """Return the C function that XLA calls (anyattn_xla.h)."""
        return self._dll.anyattn_xla

    def version(self) -> int:
        return int(self._dll.anyattn_version())

    def call_size(self) -> int:
        return int(self._dll.anyattn_call_size())

    def targets(self) -> list[str]:
        """Return the instruction sets that are compiled in and that this machine runs, in the order of targets.def."""
        names = enumerate(self.compiled_targets())
        return [name for index, name in names if self._dll.anyattn_target_available(index)]

    def compiled_targets(self) -> list[str]:
        """Return the instruction sets that are compiled in, in the order of targets.def."""
        compiled: list[str] = []
        while name := self._dll.anyattn_target_name(len(compiled)):
            compiled.append(name.decode())
        return compiled

    def target_index(self) -> int:
        """Return the `target` field of calls: 0 for the fastest, else 1 + the index of the one that the settings name.

        Raises:
            ValueError: that instruction set is not available.
        """
        wanted = settings.current().cpu_target
        if not wanted:
            return 0
        if wanted not in self.targets():
            accepted = ", ".join(self.targets())
            raise ValueError(f"ANYATTN_CPU_TARGET must be one of {accepted} (on this machine), got {wanted!r}.")
        index = 0
        while self._dll.anyattn_target_name(index) != wanted.encode():
            index += 1
        return 1 + index

    def target(self, dtype: str) -> str:
        """Return the instruction set that computes calls whose q has this dtype."""
        self.target_index()  # it exists
        chosen = self._dll.anyattn_target_for(DTYPES[dtype].code)
        return settings.current().cpu_target or self.compiled_targets()[chosen]

    def target_summary(self) -> str:
        """Return the instruction set of float32 and, in brackets, those of dtypes that have another."""
        chosen = {dtype: self.target(dtype) for dtype in ATTENTION_DTYPES}
        others = [f"{dtype}: {name}" for dtype, name in chosen.items() if name != chosen["float32"]]
        return chosen["float32"] + (f" ({', '.join(others)})" if others else "")

    def target_reasons(self, dtype: str) -> dict[str, str]:
        """Return why each other compiled instruction set does not compute calls whose q has this dtype."""
        names, chosen = self.compiled_targets(), self.target(dtype)
        if settings.current().cpu_target:
            return {name: "ANYATTN_CPU_TARGET names another" for name in names if name != chosen}
        reasons = [self._dll.anyattn_target_reason(index, DTYPES[dtype].code) for index in range(len(names))]
        return {name: reason.decode() for name, reason in zip(names, reasons, strict=True) if reason}

    def num_threads(self) -> int:
        """Return the number of threads that the next call may use."""
        return int(self._dll.anyattn_num_threads())

    def set_num_threads(self, count: int) -> None:
        """Set the number of threads of later calls. 0: follow the runtime, the affinity mask and the quota."""
        self._dll.anyattn_set_num_threads(count)

    def restore_num_threads(self, count: int) -> None:
        """Set a number that was active before. If it was the runtime's number, follow the runtime again."""
        self.set_num_threads(0)
        if count != self.num_threads():
            self.set_num_threads(count)

    def set_pool(self, name: str) -> None:
        """Choose whose threads run later calls: "openmp", "own", or "" for the automatic choice."""
        self._dll.anyattn_set_pool(settings.THREAD_POOLS.index(name))

    def thread_runtime(self) -> str:
        return str(self._dll.anyattn_thread_runtime().decode())

    def peak_flops(self, dtype: int) -> float:
        """Return floating-point operations per second of the register-only loop, with the active threads and target."""
        return float(self._dll.anyattn_peak_flops(self.target_index(), dtype, self.num_threads()))

    def error_string(self, status: int) -> str:
        return str(self._dll.anyattn_error_string(status).decode())


def load() -> Library:
    """Return the library that the settings name, or the one installed with the package.

    Raises:
        LibraryError: the library is missing, does not load, or has another version.
    """
    return _load(settings.current().library)


@cache
def _load(named: str) -> Library:
    path = named or _find()
    what = f"the native library {path}{' (ANYATTN_LIBRARY)' if named else ''}"
    try:
        library = Library(path)
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{what} does not load: {error}") from error
    if library.version() != VERSION:
        raise LibraryError(f"{what} has version {library.version():#x}; expected {VERSION:#x}")
    if library.call_size() != SIZE:
        raise LibraryError(f"{what} has a call struct of {library.call_size()} bytes; expected {SIZE}")
    _choose_threads(library)
    register_with_threadpoolctl(Library)
    return library


def _choose_threads(library: Library) -> None:
    library.set_num_threads(settings.current().num_threads)
    library.set_pool(settings.current().thread_pool)


@settings.on_reload
def _choose_threads_again() -> None:
    if _load.cache_info().currsize:
        try:
            _choose_threads(load())
        except LibraryError:
            return


def _find() -> str:
    path = package.find("lib", NAME)
    if path:
        return path
    what = f"the native library {NAME}"
    try:
        content = package.read("lib", NAME)
    except OSError as error:
        raise LibraryError(package.why_missing(what)) from error
    try:
        return _unpack(content)
    except OSError as error:
        raise LibraryError(
            f"{what} is inside the archive {package.archive()} and cannot be written to the cache folder: {error}. "
            "Unpack the archive, or set ANYATTN_CACHE to a folder of your own"
        ) from error


def _unpack(content: bytes) -> str:
    """Return the path of a file with this content in the cache folder: no system loads a library from an archive."""
    import hashlib

    stem, extension = os.path.splitext(NAME)
    folder = settings.current().cache
    if not folder:
        raise FileNotFoundError("this user has no cache folder")
    path = os.path.join(folder, f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}{extension}")
    try:
        if private_files.read(path) == content:
            return path
    except FileNotFoundError:
        pass
    private_files.write(path, content)
    return path
