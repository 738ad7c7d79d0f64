"""Masks as intervals of visible keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Mask(NamedTuple):
    """Interval of visible keys, for a query at position p = i + offset and a key at position c = j - leftpad.

        max(0, p - left, chunk * floor(p / chunk)) <= c
        c < min(n_k - leftpad, p + right + 1, chunk * (floor(p / chunk) + 1))

    Bounds are integers, or None for unbounded. The chunk terms apply only for chunk > 0. Causal means right = 0.
    """

    left: int | None = None
    right: int | None = None
    chunk: int = 0

    def bounds(self, positions: Ints, n_k: int, leftpad: int = 0) -> tuple[Ints, Ints]:
        """Return the first and the one-past-last key slot of each query; first >= last if no key is visible.

        Neither bound ever decreases.
        """
        lo = np.zeros_like(positions)
        hi = np.full_like(positions, n_k)
        if self.left is not None:
            lo = np.maximum(lo, positions - self.left)
        if self.right is not None:
            hi = np.minimum(hi, leftpad + positions + self.right + 1)
        if self.chunk > 0:
            start = positions // self.chunk * self.chunk  # rounds down for negative positions too
            lo = np.maximum(lo, start)
            hi = np.minimum(hi, leftpad + start + self.chunk)
        return lo + leftpad, hi
