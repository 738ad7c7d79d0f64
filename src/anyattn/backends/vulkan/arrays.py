"""Memory layout of arrays on the device: (head, batch, row, column), with rows of whole vectors of four values.

Heads come first, so that a range of heads, or of sequences of one head, is contiguous. If a device's bindings cannot
cover an array, each launch binds such a range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NDArray = npt.NDArray[Any]
VECTOR = 4
ALIGNMENT = 256  # bytes: the largest alignment of a binding's offset in Vulkan


@dataclass(frozen=True, slots=True)
class Region:
    """Array (head, batch, row, column). Strides in items, 0 along a broadcast axis."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    itemsize: int
    fill: int = 0  # zero columns after the last, to complete vectors

    @property
    def items(self) -> int:
        return self.extent(*self.shape[:2])

    @property
    def nbytes(self) -> int:
        return self.items * self.itemsize

    @property
    def used(self) -> int:
        """Return the number of items up to the last one that belongs to the array."""
        return self._used(*self.shape[:2])

    def extent(self, heads: int, batches: int) -> int:
        """Return the items from the first of `heads` heads and `batches` sequences to the next possible binding."""
        return -(-self._used(heads, batches) * self.itemsize // ALIGNMENT) * ALIGNMENT // self.itemsize

    def _used(self, heads: int, batches: int) -> int:
        sizes = (heads, batches, *self.shape[2:])
        if 0 in sizes:
            return 0
        return 1 + self.fill + sum((size - 1) * stride for size, stride in zip(sizes, self.strides, strict=True))

    def part(self, heads: tuple[int, int], batches: tuple[int, int]) -> tuple[int, int]:
        """Return (offset, bytes) of heads and batches [first, first + count)."""
        (h, nheads), (b, nbatch) = heads, batches
        nheads, nbatch = (min(n, size) for n, size in zip((nheads, nbatch), self.shape[:2], strict=True))
        start = h * self.strides[0] + b * self.strides[1]
        size = min(self.extent(nheads, nbatch), self.items - start)
        return start * self.itemsize, size * self.itemsize

    def view(self, memory: npt.NDArray[np.uint8]) -> NDArray:
        """Return the array in mapped memory, as unsigned integers of its item size."""
        strides = tuple(stride * self.itemsize for stride in self.strides)
        view: NDArray = np.ndarray(self.shape, f"u{self.itemsize}", memory.data, 0, strides)
        return view


def rows_region(shape: tuple[int, ...], itemsize: int, width: int) -> Region:
    """Return the region of (batch, row, head, column) or packed (row, head, column), with `width` columns in memory."""
    batch, rows, heads, columns = (1, *shape) if len(shape) == 3 else shape
    per_batch = _round(rows * width, itemsize)
    return Region((heads, batch, rows, columns), (batch * per_batch, per_batch, width, 1), itemsize, width - columns)


def lse_region(shape: tuple[int, ...]) -> Region:
    """Return the region of (batch, head, row) or packed (head, row) in float32."""
    batch, heads, rows = (1, *shape) if len(shape) == 2 else shape
    per_batch = _round(rows, 4)
    return Region((heads, batch, rows, 1), (batch * per_batch, per_batch, 1, 1), 4)


def score_region(shape: tuple[int, ...], itemsize: int) -> Region:
    """Return the region of a bias or mask (batch, head, row, key). Each axis has its full size or 1."""
    batch, heads, rows, keys = shape
    per_batch = _round(rows * keys, itemsize)
    strides = (batch * per_batch, per_batch, keys, 1)
    sizes = (heads, batch, rows, keys)
    kept = [0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
    return Region(sizes, (kept[0], kept[1], kept[2], kept[3]), itemsize)


def words_region(count: int) -> Region:
    """Return the region of numbers that every head and sequence reads."""
    return Region((1, 1, 1, count), (0, 0, 0, 1), 4)


def _round(items: int, itemsize: int) -> int:
    step = ALIGNMENT // itemsize
    return -(-items // step) * step


def arranged(name: str, array: NDArray) -> NDArray:
    """Return a view (head, batch, row, column) of a call's array."""
    raw: NDArray = array.view(f"u{array.itemsize}") if array.dtype.kind != "u" else array
    if name in ("lse", "dlse"):
        whole: NDArray = raw if raw.ndim == 3 else raw[None]
        return np.asarray(whole.transpose(1, 0, 2)[..., None])
    if name == "dsink":
        return np.asarray(raw[None, None, None])
    if name in ("bias", "mask", "dbias"):
        return np.asarray(raw.transpose(1, 0, 2, 3))
    whole = raw if raw.ndim == 4 else raw[None]
    return np.asarray(whole.transpose(2, 0, 1, 3))


def write(region: Region, memory: npt.NDArray[np.uint8], values: NDArray) -> None:
    """Copy values (from `arranged`) into mapped memory. Columns that complete vectors become 0."""
    region.view(memory)[...] = values
    if region.fill:
        shape = (*region.shape[:3], region.shape[3] + region.fill)
        Region(shape, region.strides, region.itemsize).view(memory)[..., region.shape[3] :] = 0
