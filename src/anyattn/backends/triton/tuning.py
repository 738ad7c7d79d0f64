"""Tile sizes as data: by architecture, dtype, head_dim and phase, with one heuristic for what is not in the table.

What `anyattn tune` measured on a card goes before the table.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from . import measured
from .device import INTERPRETER


class Config(NamedTuple):
    """One way to run a kernel. Loops over edge tiles have stages of their own: 1, and Hopper's spill nothing."""

    tile_q: int
    tile_k: int
    num_warps: int = 4
    num_stages: int = 2
    edge_stages: int = 1


Entry = TypeVar("Entry")
# By family of architectures, whose name it begins with, and by the widest head that an entry serves.
Table = dict[str, tuple[tuple[int, Entry], ...]]

# 16-bit forward by the widest head that a row serves (compiled with Triton 3.9: no spills but those that the tests'
# aot.json lists). Where a card is not named its family's row holds; sm_7x and gfx10 have no matrix instructions in
# Triton.
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
# float32 in full has no matrix instructions on NVIDIA's cards: operands wait in shared memory, results in registers.
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
# Few rows; tile_q is the most.
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
DECODE_ROWS = 64  # rows of a (sequence, KV head) up to which its keys are what costs
COMBINE_ROWS = 16
DELTA_ROWS = 64
SUM_ELEMENTS = 1024


def chunks(size: int) -> tuple[int, int]:
    """A dimension as one or two powers of two, each at least 16 (0: not needed): 96 is 64 + 32, 100 is 128."""
    first = max(16, 1 << (size.bit_length() - 1))
    if size <= first:
        return first, 0
    second = max(16, 1 << (size - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


def forward(arch: str, dtype: str, width: int, *, heavy: bool = False) -> Config:
    """For a tile of rows; width: the larger of the padded head_dim and head_dim_v.

    heavy: a bias, a mask, dropout or packed sequences, which hold more in registers: half the keys.
    """
    config = _measured("forward", arch, dtype, width) or _forward(arch, dtype, width)
    if heavy and arch != INTERPRETER:
        return config._replace(tile_k=min(config.tile_k, max(32, config.tile_k // 2)))
    return config


def _forward(arch: str, dtype: str, width: int) -> Config:
    if arch == INTERPRETER:
        return Config(64, 64)
    return _row(FORWARD_FLOAT32 if dtype == "float32" else FORWARD, arch, width)


def decode(arch: str, dtype: str, width: int, rows: int) -> Config:
    """For few rows: as many as there are, to a power of two."""
    config = _measured("decode", arch, dtype, width) or _decode(arch, dtype, width)
    tile_q = max(16, 1 << (rows - 1).bit_length())
    return config._replace(tile_q=min(tile_q, config.tile_q))


def _decode(arch: str, dtype: str, width: int) -> Config:
    if arch == INTERPRETER:
        return Config(DECODE_ROWS, 64)
    return _row(DECODE_FLOAT32 if dtype == "float32" else DECODE, arch, width)


# 16-bit backward: (dk and dv, whose program owns tile_k keys; dq, whose program owns tile_q rows). On NVIDIA's cards
# the first keeps addresses on the stack outside its loops; the tests' aot.json says what spills, and what in a loop.
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
    """For dk and dv, whose program owns tile_k keys; and for dq, whose program owns tile_q rows."""
    dkv, dq = _backward(arch, dtype, width)
    return _measured("dkv", arch, dtype, width) or dkv, _measured("dq", arch, dtype, width) or dq


def _backward(arch: str, dtype: str, width: int) -> tuple[Config, Config]:
    if arch == INTERPRETER:
        return Config(64, 64), Config(64, 64)
    return _row(BACKWARD_FLOAT32 if dtype == "float32" else BACKWARD, arch, width)


def bias(arch: str, dtype: str, width: int) -> Config:
    """For dbias, whose program owns a tile of scores."""
    _, dq = backward(arch, dtype, width)
    return dq


def _row(table: Table[Entry], arch: str, width: int) -> Entry:
    family = next(name for name in table if arch.startswith(name))
    return next(entry for widest, entry in table[family] if width <= widest)


def _measured(phase: str, arch: str, dtype: str, width: int) -> Config | None:
    numbers = measured.tiles(arch, phase, dtype, width)
    return Config(*numbers) if numbers else None


def has_tf32(arch: str) -> bool:
    """Whether float32 can be multiplied with fewer bits."""
    return arch in (INTERPRETER, "xpu") or (arch.startswith("sm_") and not arch.startswith("sm_7"))


def fill(rows: int, tile: int) -> float:
    """The share of a tile's rows that are used."""
    return rows / (-(-rows // tile) * tile) if rows else 1.0


def splits(programs: int, tiles: int, processors: int) -> int:
    """Into how many parts the keys are cut, so that every processor has work: the fewest within 85 % of the best.

    programs: without splits; tiles: of keys, at most. As in FlashAttention's heuristics for decoding.
    """
    if programs == 0 or programs >= 0.8 * processors or tiles <= 4:
        return 1
    counts = range(1, min(128, tiles, processors) + 1)
    shares = [programs * n / processors / -(-programs * n // processors) for n in counts]
    best = max(shares)
    return next(n for n, share in zip(counts, shares, strict=True) if share >= 0.85 * best)


def section(pairs: int, pair_bytes: int, l2_bytes: int) -> int:
    """How many heads take turns tile by tile: the longest tiles of all of them first, while their keys stay in L2."""
    return max(1, min(pairs, l2_bytes // 2 // max(pair_bytes, 1)))
