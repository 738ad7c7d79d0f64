"""Tiles that `anyattn tune` found to be the fastest on a card of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ...config import settings, tuning_files

FILE = "triton-tiles.json"
PHASES = ("forward", "decode", "dkv", "dq")
WIDTHS = (64, 128, 256, 512)  # each stands for the head sizes above the one before
TILES = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 5)
CHOICES = (TILES, TILES, WARPS, STAGES, STAGES)

Tiles = tuple[int, ...]  # of a tuning.Config


def tiles(arch: str, phase: str, dtype: str, width: int) -> Tiles | None:
    """What was measured for such a problem; None before."""
    return _load().get(arch, {}).get(_name(phase, dtype, width))


def use(arch: str, phase: str, dtype: str, width: int, found: Tiles) -> None:
    """In this process, for the plans that are made from now on, until the settings are read again."""
    _load().setdefault(arch, {})[_name(phase, dtype, width)] = found


def save() -> Path:
    """Keeps what is in use.

    Raises:
        OSError: there is no cache folder, or it cannot be written.
    """
    return tuning_files.save(FILE, _load())


def _name(phase: str, dtype: str, width: int) -> str:
    """Both 16-bit dtypes take the same tiles."""
    bits = 32 if dtype == "float32" else 16
    return f"{phase} {bits}-bit {next(widest for widest in WIDTHS if width <= widest)}"


@cache
def _load() -> dict[str, dict[str, Tiles]]:
    return tuning_files.load(FILE, _parse)


def _parse(entry: Mapping[str, list[int]]) -> dict[str, Tiles]:
    for name, numbers in entry.items():
        if len(numbers) != len(CHOICES) or any(x not in some for x, some in zip(numbers, CHOICES, strict=True)):
            raise ValueError(f"{name} is {numbers}")
    return {name: tuple(numbers) for name, numbers in entry.items()}


settings.on_reload(_load.cache_clear)
