"""Every environment variable of anyattn, read here and nowhere else.

The environment is read at first use; `reload` reads it again (and forgets every cached plan).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields

VARIABLES = {
    "backend": ("ANYATTN_BACKEND", "", "backends to use, in order, separated by commas; empty: automatic choice"),
    "require": ("ANYATTN_REQUIRE", "", "backends that must be available: missing ones raise at the first call"),
    "cpu_target": ("ANYATTN_CPU_TARGET", "", "instruction set of the native engine; empty: the best of this machine"),
    "num_threads": ("ANYATTN_NUM_THREADS", "0", "threads of the native engine; 0: the OpenMP runtime's or all cores"),
    "library": ("ANYATTN_LIBRARY", "", "path of the native library; empty: the one installed with the package"),
    "check": ("ANYATTN_CHECK", "0", "1: check values in device memory too, at the price of a synchronisation"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment, parsed. `VARIABLES` gives each field's variable, default and meaning."""

    backend: tuple[str, ...]
    require: tuple[str, ...]
    cpu_target: str
    num_threads: int
    library: str
    check: bool


_current: Settings | None = None
_listeners: list[Callable[[], None]] = []


def current() -> Settings:
    """The settings in force."""
    global _current
    if _current is None:
        _current = _read()
    return _current


def reload() -> Settings:
    """Reads the environment again; everything that was derived from the old settings is forgotten."""
    global _current
    _current = _read()
    for listener in _listeners:
        listener()
    return _current


def on_reload(listener: Callable[[], None]) -> Callable[[], None]:
    """Calls `listener` whenever the settings may have changed."""
    _listeners.append(listener)
    return listener


def describe() -> dict[str, tuple[str, str]]:
    """Variable name -> (value in force, meaning), for `anyattn info`."""
    now = current()
    values = {field.name: getattr(now, field.name) for field in fields(now)}
    return {VARIABLES[name][0]: (_text(value), VARIABLES[name][2]) for name, value in values.items()}


def _read() -> Settings:
    raw = {name: os.environ.get(variable, default).strip() for name, (variable, default, _) in VARIABLES.items()}
    return Settings(
        backend=_names(raw["backend"]),
        require=_names(raw["require"]),
        cpu_target=raw["cpu_target"],
        num_threads=_count("num_threads", raw["num_threads"]),
        library=raw["library"],
        check=_count("check", raw["check"]) != 0,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _count(name: str, text: str) -> int:
    if text == "":
        return 0
    if not text.isdigit() or int(text) > 4096:
        raise ValueError(f"{VARIABLES[name][0]}={text!r}: expected an integer from 0 to 4096 ({VARIABLES[name][2]})")
    return int(text)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(int(value)) if isinstance(value, bool) else str(value)
