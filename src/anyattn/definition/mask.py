"""Masks as intervals: which keys a row may see."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Mask(NamedTuple):
    """Interval of keys that a row sees, from its position p = i + offset and a key's c = j - leftpad:

        max(0, p - left, chunk * floor(p / chunk)) <= c
        c < min(n_k - leftpad, p + right + 1, chunk * (floor(p / chunk) + 1))

    Bounds are any integers, or None for unbounded; the chunk terms exist only for chunk > 0. Causal is right = 0.
    """

    left: int | None = None
    right: int | None = None
    chunk: int = 0

    def bounds(self, positions: Ints, n_k: int, leftpad: int = 0) -> tuple[Ints, Ints]:
        """First and one-past-last key slot of each row; first >= last where a row sees none. Neither ever decreases."""
        lo = np.zeros_like(positions)
        hi = np.full_like(positions, n_k)
        if self.left is not None:
            lo = np.maximum(lo, positions - self.left)
        if self.right is not None:
            hi = np.minimum(hi, leftpad + positions + self.right + 1)
        if self.chunk > 0:
            start = positions // self.chunk * self.chunk  # floors, for negative positions too
            lo = np.maximum(lo, start)
            hi = np.minimum(hi, leftpad + start + self.chunk)
        return lo + leftpad, hi
