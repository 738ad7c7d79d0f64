"""Limits of this machine, measured in the same run: arithmetic in registers, and reading memory."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

from ..backends.cpu import library
from ..definition.dtypes import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

STREAM_BYTES = 2**29  # far larger than any cache
REPEATS = 5


def flops(dtype: str) -> float | None:
    """Return the current register-only rate in this dtype (float16 as float32); None without the CPU engine."""
    try:
        return library.load().peak_flops(DTYPES["float32" if dtype == "float16" else dtype].code)
    except library.LibraryError:
        return None


class Stream:
    """Bandwidth of summing a long array on all of torch's threads: bytes per second, the best of a few."""

    @cached_property
    def _array(self) -> Tensor:
        import torch

        return torch.ones(STREAM_BYTES // 4)

    def read(self) -> float:
        self._array.sum()
        best = float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter()
            self._array.sum()
            best = min(best, time.perf_counter() - start)
        return STREAM_BYTES / best


def best(*values: float | None) -> float | None:
    """Return the largest of several measurements of one limit, because noise only lowers it."""
    return max((value for value in values if value is not None), default=None)
