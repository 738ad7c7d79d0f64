"""What this machine allows, measured in the same run: arithmetic in registers, and reading memory."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

from ..backends.cpu import library
from ..definition.dtypes import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

STREAM_BYTES = 2**29  # far beyond any cache
REPEATS = 5


def flops(dtype: str) -> float | None:
    """What registers alone would allow in this dtype, now; float16 is computed in float32. None: no native library."""
    try:
        return library.load().peak_flops(DTYPES["float32" if dtype == "float16" else dtype].code)
    except library.LibraryError:
        return None


class Stream:
    """Bytes per second of adding up a long array on all of torch's threads; the best of a few."""

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
    """The largest of several measurements of one ceiling: noise only lowers it."""
    return max((value for value in values if value is not None), default=None)
