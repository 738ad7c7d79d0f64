"""Tuning of the Triton kernels: tables of tile sizes by architecture, dtype, head_dim and phase, and heuristics.

Tile sizes that `anyattn tune` stored for a card (tuned tiles) take precedence over the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from ...config import settings, tuning_files
from .device import INTERPRETER

FILE = "triton-tiles.json"
PHASES = ("forward", "decode", "dkv", "dq")
WIDTHS = (64, 128, 256, 512)  # tuned tiles of a width are used for head sizes above the next smaller width
# Accepted values of a tuned Config, by field
TILES = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 5)
CHOICES = (TILES, TILES, WARPS, STAGES, STAGES)

Tiles = tuple[int, ...]  # the fields of a Config


class Config(NamedTuple):
    """Launch configuration of a kernel. Loops over edge tiles have their own stages: 1 avoids spills on Hopper."""

    tile_q: int
    tile_k: int
    num_warps: int = 4
    num_stages: int = 2
    edge_stages: int = 1


Entry = TypeVar("Entry")
# By family of architectures (a prefix of the name), and by the widest head that an entry is used for.
Table = dict[str, tuple[tuple[int, Entry], ...]]

# 16-bit forward, by the widest head that an entry is used for. Compiled with Triton 3.9: there are no spills except
# those in the tests' aot.json. A card that is not listed uses its family's entry. sm_7x and gfx10 have no matrix
# instructions in Triton.
FORWARD: Table[Config] = {
    "sm_7": ((64, Config(32, 32, 4, 1)), (512, Config(16, 16, 4, 1))),
    "sm_9": (
        (64, Config(128, 128, 8, 2)),
        (128, Config(128, 128, 8, 2)),
        (256, Config(64, 64, 8, 2)),
        (512, Config(16, 32, 4, 1)),
    ),
    "sm_10": (
        (64, Config(128, 64, 8, 2)),
        (128, Config(128, 64, 8, 2)),
        (256, Config(64, 32, 8, 2)),
        (512, Config(16, 32, 4, 1)),
    ),
    "sm_12": (
        (64, Config(128, 64, 8, 2, 2)),
        (128, Config(64, 32, 4, 2, 2)),
        (256, Config(32, 32, 8, 2, 2)),
        (512, Config(16, 32, 4, 1)),
    ),
    "sm_": (
        (64, Config(128, 64, 8, 2, 2)),
        (128, Config(128, 64, 8, 2, 2)),
        (256, Config(32, 32, 8, 2, 2)),
        (512, Config(16, 32, 4, 1)),
    ),
    "gfx9": ((128, Config(128, 64, 4, 1)), (256, Config(64, 32, 4, 1)), (512, Config(16, 32, 4, 1))),
    "gfx10": ((64, Config(32, 16, 8, 1)), (512, Config(16, 16, 8, 1))),
    "gfx11": ((64, Config(64, 32, 4, 1)), (128, Config(32, 16, 4, 1)), (512, Config(16, 16, 4, 1))),
    "": ((64, Config(64, 32, 4, 1)), (256, Config(32, 32, 4, 1)), (512, Config(16, 16, 4, 1))),
}
# Full float32 has no matrix instructions on NVIDIA's cards: operands are in shared memory, results in registers.
FORWARD_FLOAT32: Table[Config] = {
    "sm_7": ((64, Config(32, 32, 4, 1)), (256, Config(16, 32, 4, 1)), (512, Config(16, 16, 4, 1))),
    "sm_": (
        (64, Config(64, 32, 8, 1)),
        (128, Config(32, 32, 8, 1)),
        (256, Config(16, 32, 8, 1)),
        (512, Config(16, 16, 8, 1)),
    ),
    "": ((64, Config(32, 32, 4, 1)), (512, Config(16, 32, 4, 1))),
}
# Decoding: tile_q is the maximum.
DECODE: Table[Config] = {
    "sm_7": ((128, Config(32, 32, 8, 1)), (256, Config(16, 32, 8, 1)), (512, Config(16, 16, 8, 1))),
    "sm_": ((128, Config(64, 64, 4, 3)), (256, Config(32, 64, 4, 2)), (512, Config(16, 32, 4, 1))),
    "gfx9": ((128, Config(64, 64, 4, 2)), (256, Config(64, 32, 4, 2)), (512, Config(16, 32, 4, 1))),
    "": ((64, Config(64, 64, 8, 1)), (128, Config(32, 32, 8, 1)), (512, Config(16, 16, 8, 1))),
}
DECODE_FLOAT32: Table[Config] = {
    "sm_": ((128, Config(32, 32, 4, 1)), (256, Config(16, 32, 8, 1)), (512, Config(16, 16, 4, 1))),
    "gfx9": ((128, Config(32, 32, 4, 1)), (256, Config(16, 32, 4, 1)), (512, Config(16, 16, 4, 1))),
    "": ((64, Config(16, 32, 8, 1)), (512, Config(16, 16, 8, 1))),
}
DECODE_ROWS = 64  # queries of a (sequence, KV head) up to which reading keys dominates the time
COMBINE_ROWS = 16
DELTA_ROWS = 64
SUM_ELEMENTS = 1024


def chunks(size: int) -> tuple[int, int]:
    """Return a dimension as one or two powers of two, each at least 16 (0: unused): 96 is 64 + 32, 100 is 128."""
    first = max(16, 1 << (size.bit_length() - 1))
    if size <= first:
        return first, 0
    second = max(16, 1 << (size - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


def forward(arch: str, dtype: str, width: int, *, heavy: bool = False) -> Config:
    """Return the configuration of the forward kernel; width: the larger of the padded head_dim and head_dim_v.

    heavy: a bias, a mask, dropout, packed sequences or quantised keys, which need more registers, so tiles have half
    the keys.
    """
    config = _tuned("forward", arch, dtype, width) or _forward(arch, dtype, width)
    if heavy and arch != INTERPRETER:
        return config._replace(tile_k=min(config.tile_k, max(32, config.tile_k // 2)))
    return config


def _forward(arch: str, dtype: str, width: int) -> Config:
    if arch == INTERPRETER:
        return Config(64, 64)
    return _row(FORWARD_FLOAT32 if dtype == "float32" else FORWARD, arch, width)


def decode(arch: str, dtype: str, width: int, rows: int) -> Config:
    """Return the configuration of decoding.

    tile_q is `rows` rounded up to a power of two, at most the table's value.
    """
    config = _tuned("decode", arch, dtype, width) or _decode(arch, dtype, width)
    tile_q = max(16, 1 << (rows - 1).bit_length())
    return config._replace(tile_q=min(tile_q, config.tile_q))


def _decode(arch: str, dtype: str, width: int) -> Config:
    if arch == INTERPRETER:
        return Config(DECODE_ROWS, 64)
    return _row(DECODE_FLOAT32 if dtype == "float32" else DECODE, arch, width)


# 16-bit backward: (dk and dv, whose program owns tile_k keys; dq, whose program owns tile_q queries). On NVIDIA's cards
# the first kernel spills addresses to the stack outside its loops. The tests' aot.json lists all spills.
BACKWARD: Table[tuple[Config, Config]] = {
    "sm_7": (
        (64, (Config(32, 32, 4, 1), Config(32, 32, 4, 1))),
        (512, (Config(16, 16, 4, 1), Config(16, 16, 4, 1))),
    ),
    "sm_9": (
        (64, (Config(64, 128, 8, 2), Config(128, 64, 8, 2))),
        (128, (Config(32, 128, 8, 2), Config(128, 64, 8, 2))),
        (256, (Config(32, 32, 8, 1), Config(32, 32, 8, 1))),
        (512, (Config(16, 16, 8, 1), Config(16, 16, 8, 1))),
    ),
    "sm_": (
        (64, (Config(64, 128, 8, 2), Config(64, 64, 4, 2))),
        (96, (Config(32, 128, 8, 2), Config(64, 64, 8, 2))),
        (128, (Config(64, 64, 8, 2), Config(64, 64, 8, 2))),
        (256, (Config(32, 32, 8, 1), Config(32, 32, 8, 2))),
        (512, (Config(16, 16, 8, 1), Config(16, 16, 8, 1))),
    ),
    "gfx9": (
        (64, (Config(64, 64, 4, 1), Config(64, 64, 4, 1))),
        (128, (Config(32, 64, 4, 1), Config(64, 64, 4, 1))),
        (256, (Config(32, 32, 4, 1), Config(32, 32, 4, 1))),
        (512, (Config(16, 16, 4, 1), Config(16, 16, 4, 1))),
    ),
    "gfx10": ((512, (Config(16, 16, 8, 1), Config(16, 16, 8, 1))),),
    "": (
        (64, (Config(32, 32, 8, 1), Config(32, 32, 4, 1))),
        (128, (Config(16, 32, 4, 1), Config(32, 32, 8, 1))),
        (512, (Config(16, 16, 4, 1), Config(16, 16, 4, 1))),
    ),
}
BACKWARD_FLOAT32: Table[tuple[Config, Config]] = {
    "sm_7": (
        (64, (Config(32, 32, 8, 1), Config(32, 32, 8, 1))),
        (512, (Config(16, 16, 4, 1), Config(16, 16, 4, 1))),
    ),
    "sm_": (
        (64, (Config(32, 32, 8, 1), Config(64, 32, 8, 2))),
        (128, (Config(32, 32, 8, 1), Config(32, 32, 8, 2))),
        (256, (Config(16, 16, 8, 1), Config(16, 16, 8, 2))),
        (512, (Config(16, 16, 4, 1), Config(16, 16, 4, 1))),
    ),
    "gfx9": (
        (64, (Config(32, 32, 4, 1), Config(32, 32, 4, 1))),
        (512, (Config(16, 16, 4, 1), Config(16, 16, 4, 1))),
    ),
    "": (
        (64, (Config(32, 32, 8, 1), Config(32, 32, 8, 1))),
        (512, (Config(16, 16, 4, 1), Config(16, 16, 4, 1))),
    ),
}


def backward(arch: str, dtype: str, width: int) -> tuple[Config, Config]:
    """Return the configurations of dk and dv, whose program owns tile_k keys, and of dq, with tile_q queries."""
    dkv, dq = _backward(arch, dtype, width)
    return _tuned("dkv", arch, dtype, width) or dkv, _tuned("dq", arch, dtype, width) or dq


def _backward(arch: str, dtype: str, width: int) -> tuple[Config, Config]:
    if arch == INTERPRETER:
        return Config(64, 64), Config(64, 64)
    return _row(BACKWARD_FLOAT32 if dtype == "float32" else BACKWARD, arch, width)


# Tangents, and second derivatives (all their kernels), whose programs read twice as many arrays as gradients. Tiles are
# small, so that registers suffice.
TANGENT: Table[Config] = {
    "sm_7": ((64, Config(32, 16, 4, 1)), (512, Config(16, 16, 4, 1))),
    "sm_9": ((64, Config(64, 64, 4, 1)), (128, Config(64, 32, 4, 1)), (512, Config(16, 16, 8, 1))),
    "sm_10": ((64, Config(64, 32, 4, 1)), (128, Config(64, 32, 8, 1)), (512, Config(16, 16, 8, 1))),
    "sm_": ((64, Config(64, 32, 4, 1)), (128, Config(32, 32, 8, 1)), (512, Config(16, 16, 8, 1))),
    "gfx9": ((64, Config(64, 64, 4, 1)), (128, Config(64, 32, 4, 1)), (512, Config(16, 16, 8, 1))),
    "": ((64, Config(32, 16, 4, 1)), (512, Config(16, 16, 4, 1))),
}
SECOND: Table[Config] = {
    "sm_7": ((512, Config(16, 16, 4, 1)),),
    "sm_": ((64, Config(32, 32, 4, 1)), (128, Config(32, 32, 8, 1)), (512, Config(16, 16, 8, 1))),
    "gfx9": ((64, Config(32, 32, 4, 1)), (128, Config(16, 16, 4, 1)), (512, Config(16, 16, 8, 1))),
    "": ((512, Config(16, 16, 4, 1)),),
}
DERIVATIVES_FLOAT32: Table[Config] = {
    "sm_7": ((512, Config(16, 16, 4, 1)),),
    "": ((64, Config(16, 32, 8, 1)), (512, Config(16, 16, 8, 1))),
}


def tangent(arch: str, dtype: str, width: int) -> Config:
    """Return the configuration of tangents, whose program owns tile_q queries."""
    return _derivative(TANGENT, arch, dtype, width)


def second(arch: str, dtype: str, width: int) -> Config:
    """Return the configuration of second derivatives, whose programs own tile_k keys or tile_q queries."""
    return _derivative(SECOND, arch, dtype, width)


def _derivative(table: Table[Config], arch: str, dtype: str, width: int) -> Config:
    if arch == INTERPRETER:
        return Config(64, 64)
    return _row(DERIVATIVES_FLOAT32 if dtype == "float32" else table, arch, width)


def bias(arch: str, dtype: str, width: int) -> Config:
    """Return the configuration of dbias, whose program owns a tile of scores."""
    _, dq = backward(arch, dtype, width)
    return dq


def _row(table: Table[Entry], arch: str, width: int) -> Entry:
    family = next(name for name in table if arch.startswith(name))
    return next(entry for widest, entry in table[family] if width <= widest)


def _tuned(phase: str, arch: str, dtype: str, width: int) -> Config | None:
    tiles = tuned_tiles(arch, phase, dtype, width)
    return Config(*tiles) if tiles else None


def has_tf32(arch: str) -> bool:
    """Return whether the architecture can multiply float32 with fewer bits (TF32)."""
    return arch in (INTERPRETER, "xpu") or (arch.startswith("sm_") and not arch.startswith("sm_7"))


def has_float8(arch: str) -> bool:
    """Return whether the architecture converts float8_e4m3fn by an instruction, according to Triton's compiler."""
    return arch.startswith(("sm_89", "sm_9", "sm_10", "sm_12", "gfx950", "gfx12"))


def fill(rows: int, tile: int) -> float:
    """Return the share of the rows of all tiles that is in use."""
    return rows / (-(-rows // tile) * tile) if rows else 1.0


def splits(programs: int, tiles: int, processors: int) -> int:
    """Return the number of splits of the keys: the smallest number within 85 % of the best use of the processors.

    programs: without splits; tiles: of keys, at most. FlashAttention's decoding uses this heuristic too.
    """
    if programs == 0 or programs >= 0.8 * processors or tiles <= 4:
        return 1
    counts = range(1, min(128, tiles, processors) + 1)
    shares = [programs * n / processors / -(-programs * n // processors) for n in counts]
    best = max(shares)
    return next(n for n, share in zip(counts, shares, strict=True) if share >= 0.85 * best)


def section(pairs: int, pair_bytes: int, l2_bytes: int) -> int:
    """Return the number of heads that alternate tile by tile, longest tiles first, while their keys stay in L2."""
    return max(1, min(pairs, l2_bytes // 2 // max(pair_bytes, 1)))


def tuned_tiles(arch: str, phase: str, dtype: str, width: int) -> Tiles | None:
    """Return the tuned tiles of an architecture and a phase; None if there are none."""
    return _load().get(arch, {}).get(_name(phase, dtype, width))


def use_tiles(arch: str, phase: str, dtype: str, width: int, tiles: Tiles) -> None:
    """Use these tiles for plans that this process makes, until the settings are read again."""
    _load().setdefault(arch, {})[_name(phase, dtype, width)] = tiles


def save_tiles() -> Path:
    """Write the active tuned tiles to the cache folder.

    Raises:
        OSError: the cache folder does not exist or cannot be written.
    """
    return tuning_files.save(FILE, _load())


def _name(phase: str, dtype: str, width: int) -> str:
    """Return the key of an entry. Both 16-bit dtypes share their tiles."""
    bits = 32 if dtype == "float32" else 16
    return f"{phase} {bits}-bit {next(widest for widest in WIDTHS if width <= widest)}"


@cache
def _load() -> dict[str, dict[str, Tiles]]:
    """Return the tuned tiles by architecture and key."""
    return tuning_files.load(FILE, _parse)


def _parse(entry: Mapping[str, list[int]]) -> dict[str, Tiles]:
    for name, numbers in entry.items():
        if len(numbers) != len(CHOICES) or any(x not in some for x, some in zip(numbers, CHOICES, strict=True)):
            raise ValueError(f"{name} must hold accepted numbers, got {numbers}")
    return {name: tuple(numbers) for name, numbers in entry.items()}


settings.on_reload(_load.cache_clear)
