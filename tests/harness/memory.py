"""Guarded memory for results and workspaces. Writes outside of them are detected, and unwritten values stay NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anyattn.frameworks.numpy import NumpyAdapter

GUARD = 256


class Memory:
    """Buffers filled with 0xFF (NaN in every floating-point type), between guards that must not be written."""

    def __init__(self) -> None:
        self.blocks: list[tuple[np.ndarray, int, int]] = []

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """Return an array for a result or a workspace, filled with 0xFF."""
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.full(size + 2 * GUARD + 128, 0xFF, np.uint8)
        aligned = GUARD + -(raw.ctypes.data + GUARD) % 64
        # A workspace is aligned; a result may have any address.
        start = aligned + (0 if dtype == np.uint8 else dtype.itemsize)
        self.blocks.append((raw, start, size))
        return raw[start : start + size].view(dtype).reshape(shape)

    def check(self) -> None:
        """Raise AssertionError if a guard of a buffer was written since the last check."""
        blocks, self.blocks = self.blocks, []
        for raw, start, size in blocks:
            assert (raw[:start] == 0xFF).all(), "a backend wrote before the beginning of a result or workspace"
            assert (raw[start + size :] == 0xFF).all(), "a backend wrote past the end of a result or workspace"


def guarded_empty(memory: Memory) -> Callable[..., np.ndarray]:
    """Return a replacement of `NumpyAdapter.empty` whose arrays come from this memory."""
    original = NumpyAdapter.empty

    def empty(self: NumpyAdapter, shape: Sequence[int], dtype: str, like: np.ndarray) -> np.ndarray:
        return memory.empty(shape, original(self, (0,) * len(shape), dtype, like).dtype)

    return empty
