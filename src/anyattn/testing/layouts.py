"""Arrays inside larger buffers, as callers pass them: slices, transposes, steps, any address."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STEPS = (1, 1, 1, 2, 3, -1, -2)


def embedded(values: Array, layout: str) -> tuple[Array, Array]:
    """Return a view with these values and the buffer around it, of NaN, True or integers. `layout` is a Case's."""
    order = list(range(values.ndim))
    if layout == "bhsd" and values.ndim >= 3:
        order[-3], order[-2] = order[-2], order[-3]
    moved = values.transpose(order)
    step = [1] * moved.ndim
    if layout == "last":
        step[-1] = 2
    if layout == "slices":
        step[-3] = 2
    size = [n * s + 2 for n, s in zip(moved.shape, step, strict=True)]
    buffer = np.full(size, _outside(values.dtype), values.dtype)
    view = buffer[tuple(slice(1, 1 + n * s, s) for n, s in zip(moved.shape, step, strict=True))]
    if layout == "reversed":
        view = view[..., ::-1, ::-1, :]
    view[...] = moved
    return view.transpose(np.argsort(order)), buffer


def scattered(
    values: Array, rng: np.random.Generator, *, rows: bool = False, torch: bool = False
) -> tuple[Array, Array]:
    """Return a view with these values and the buffer around it, of NaN, True or integers that are invalid in tables.

    rows: the last dimension stays contiguous and elements aligned, otherwise usually; torch: no negative strides, and
    no address that its dtype forbids. The view may reach both ends of the buffer, which a sanitizer watches.
    """
    rank = values.ndim
    order = rng.permutation(rank)
    steps = np.ones(rank, int)
    pads = np.zeros((rank, 2), int)
    if rank:
        steps[rng.integers(rank)] = rng.choice(STEPS)
        for axis in rng.integers(0, rank, 2):
            pads[axis] = rng.integers(0, 3, 2)
        if rows or rng.random() < 0.7:
            order = np.append(order[order != rank - 1], rank - 1)
            steps[-1] = 1
    steps = np.abs(steps) if torch else steps
    spans = np.array([max(0, (n - 1) * abs(s) + 1) for n, s in zip(values.shape, steps, strict=True)], int)
    sizes = spans + pads.sum(axis=1)
    buffer, whole = _filled(sizes[order], values.dtype, rng, aligned=rows or torch or rng.random() < 0.9)
    inside = whole.transpose(np.argsort(order))
    view = inside[tuple(slice(p, p + n, abs(s)) for (p, _), n, s in zip(pads, spans, steps, strict=True))]
    view = view[tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]
    view[...] = values
    return view, buffer


def _filled(sizes: Array, dtype: np.dtype[Any], rng: np.random.Generator, *, aligned: bool) -> tuple[Array, Array]:
    """Return a buffer of bytes, and most of its elements as an array of these sizes."""
    count, lead = int(np.prod(sizes)), int(rng.integers(0, 5))
    shift = 0 if aligned or dtype.itemsize == 1 else 1
    buffer = np.empty((lead + count) * dtype.itemsize + shift, np.uint8)
    elements = buffer[shift:].view(dtype)
    elements[:] = _outside(dtype)
    buffer[:shift] = 0xFF
    return buffer, elements[lead:].reshape(sizes)


def _outside(dtype: np.dtype[Any]) -> Any:
    """Return the value of memory outside a view."""
    if dtype.kind in "iu":
        return np.iinfo(dtype).max
    return True if dtype.kind == "b" else np.nan


def around(view: Array, buffer: Array) -> bytes:
    """Return the contents of the buffer outside the view."""
    values = view.copy()
    view[...] = 0
    outside = buffer.tobytes()
    view[...] = values
    return outside
