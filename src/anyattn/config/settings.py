"""Environment variables of anyattn. No other module reads the environment.

The environment is read at first use. `reload` reads it again and discards every cached plan.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

VARIABLES = {
    "backend": ("ANYATTN_BACKEND", "", "backends to use, in order, separated by commas; empty: automatic choice"),
    "require": ("ANYATTN_REQUIRE", "", "backends that must be available: a missing backend raises at the first call"),
    "cpu_target": ("ANYATTN_CPU_TARGET", "", "instruction set of the CPU engine; empty: the fastest for each dtype"),
    "precision": (
        "ANYATTN_PRECISION",
        "exact",
        "exact or fast, for calls without `precision`; fast: float32 products on AMX tiles use 16 of 24 bits",
    ),
    "num_threads": ("ANYATTN_NUM_THREADS", "0", "threads of the CPU engine; 0: as many as OpenMP uses, or all cores"),
    "thread_pool": (
        "ANYATTN_THREAD_POOL",
        "",
        "openmp or own: threads of the CPU engine; empty: OpenMP's, or its own while other processes keep OpenMP's "
        "waiting",
    ),
    "omp_num_threads": ("OMP_NUM_THREADS", "", "OpenMP's threads at each nesting level; anyattn uses the first"),
    "library": ("ANYATTN_LIBRARY", "", "path of the native library; empty: the one installed with the package"),
    "vulkan_device": ("ANYATTN_VULKAN_DEVICE", "", "number or part of the name of a Vulkan device; empty: the best"),
    "vulkan_software": ("ANYATTN_VULKAN_SOFTWARE", "0", "1: also use Vulkan drivers that run on the CPU"),
    "vulkan_validate": ("ANYATTN_VULKAN_VALIDATE", "0", "1: check every Vulkan call with Khronos' validation layer"),
    "vulkan_timeout": ("ANYATTN_VULKAN_TIMEOUT", "300", "seconds before a hanging Vulkan device is abandoned"),
    "cache": (
        "ANYATTN_CACHE",
        "",
        "folder of compiled shaders and of values measured by `anyattn tune`; empty: the user's cache folder",
    ),
    "check": (
        "ANYATTN_CHECK",
        "0",
        "1: also check scales per slot, and tables in device memory, which synchronises the device",
    ),
    "hopper": ("ANYATTN_HOPPER", "0", "1: use the Triton backend's kernels for Hopper (sm_90), not yet run on a GPU"),
}
MOST_THREADS = 4096  # of the CPU engine
LONGEST_WAIT = 10**6  # seconds
PRECISIONS = ("exact", "fast")
THREAD_POOLS = ("", "openmp", "own")  # by their numbers in anyattn.h


class Settings(NamedTuple):
    """Parsed environment. `VARIABLES` gives each field's variable, default and meaning."""

    backend: tuple[str, ...]
    require: tuple[str, ...]
    cpu_target: str
    precision: str
    num_threads: int
    thread_pool: str
    omp_num_threads: tuple[int, ...]
    library: str
    vulkan_device: str
    vulkan_software: bool
    vulkan_validate: bool
    vulkan_timeout: int
    cache: str
    check: bool
    hopper: bool


# One entry and no lock: dictionaries are thread-safe, and a forked child could inherit a held lock.
_current: dict[str, Settings] = {}
_listeners: list[Callable[[], None]] = []


def current() -> Settings:
    """Return the active settings."""
    return _current.get("settings") or _current.setdefault("settings", _read())


def reload() -> Settings:
    """Read the environment again and discard everything derived from the old settings."""
    _current["settings"] = fresh = _read()
    for listener in _listeners:
        listener()
    return fresh


def on_reload(listener: Callable[[], None]) -> Callable[[], None]:
    """Register `listener` to be called when the settings may have changed; return it."""
    _listeners.append(listener)
    return listener


def describe() -> dict[str, tuple[str, str]]:
    """Return (active value, meaning) by variable name, for `anyattn info`."""
    values = current()._asdict()
    return {VARIABLES[name][0]: (_text(value), VARIABLES[name][2]) for name, value in values.items()}


def _read() -> Settings:
    raw = {name: os.environ.get(variable, default).strip() for name, (variable, default, _) in VARIABLES.items()}
    num_threads = _number("num_threads", raw["num_threads"] or "0", 0, MOST_THREADS)
    return Settings(
        backend=_names(raw["backend"]),
        require=_names(raw["require"]),
        cpu_target=raw["cpu_target"],
        precision=_choice("precision", raw["precision"] or "exact", PRECISIONS),
        num_threads=num_threads,
        thread_pool=_choice("thread_pool", raw["thread_pool"], THREAD_POOLS),
        # A user who sets the number of threads does not need OpenMP for it.
        omp_num_threads=() if num_threads else _levels("omp_num_threads", raw["omp_num_threads"]),
        library=raw["library"],
        vulkan_device=raw["vulkan_device"],
        vulkan_software=_flag("vulkan_software", raw),
        vulkan_validate=_flag("vulkan_validate", raw),
        vulkan_timeout=_number("vulkan_timeout", raw["vulkan_timeout"] or "300", 1, LONGEST_WAIT),
        cache=raw["cache"] or _cache_folder(),
        check=_flag("check", raw),
        hopper=_flag("hopper", raw),
    )


def _cache_folder() -> str:
    """Return the folder in which the system stores a user's caches; "" for a user without a home."""
    others = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches")}
    variable, usual = others.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    given, home = os.environ.get(variable, ""), os.path.expanduser("~")
    if os.path.isabs(given):
        return os.path.join(given, "anyattn")
    return "" if home == "~" else os.path.join(home, *usual.split("/"), "anyattn")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _choice(name: str, text: str, accepted: tuple[str, ...]) -> str:
    if text not in accepted:
        raise _invalid(name, text, f"one of {', '.join(filter(None, accepted))}, or nothing ({VARIABLES[name][2]})")
    return text


def _flag(name: str, raw: dict[str, str]) -> bool:
    return _number(name, raw[name] or "0", 0, 1) != 0


def _number(name: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise _invalid(name, text, f"an integer from {least} to {most} ({VARIABLES[name][2]})")
    return int(text)


def _levels(name: str, text: str) -> tuple[int, ...]:
    """Return the numbers in a variable that other libraries define.

    A value that is not a list of numbers is ignored.
    """
    numbers = [part.strip().removeprefix("+") for part in text.split(",")] if text else []
    if all(number.isascii() and number.isdigit() and 1 <= int(number) <= MOST_THREADS for number in numbers):
        return tuple(int(number) for number in numbers)
    accepted = f"integers from 1 to {MOST_THREADS}, separated by commas"
    warnings.warn(
        f"{VARIABLES[name][0]}={text!r} is ignored because it must be {accepted}. "
        "Set ANYATTN_NUM_THREADS to choose the number for anyattn.",
        RuntimeWarning,
        stacklevel=2,
    )
    return ()


def _invalid(name: str, text: str, expected: str) -> ValueError:
    return ValueError(f"{VARIABLES[name][0]} must be {expected}, got {text!r}.")


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(int(value)) if isinstance(value, bool) else str(value)
