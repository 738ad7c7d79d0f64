"""Arrays laid out at random inside larger buffers, as callers bring them: slices, transposes, steps, any address."""

from __future__ import annotations

import numpy as np

STEPS = (1, 1, 1, 2, 3, -1, -2)


def scattered(
    values: np.ndarray, rng: np.random.Generator, *, rows: bool = False, torch: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(a view with these values, the buffer around it, of NaN, of True or of integers that no table may hold).

    rows: the last dimension stays contiguous and elements aligned, else most often; torch: no negative strides, no
    address that its dtype forbids. The view may reach both ends of the buffer, where a sanitizer watches.
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


def _filled(
    sizes: np.ndarray, dtype: np.dtype, rng: np.random.Generator, *, aligned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(buffer of bytes, all but a few elements of it as an array of these sizes)."""
    count, lead = int(np.prod(sizes)), int(rng.integers(0, 5))
    shift = 0 if aligned or dtype.itemsize == 1 else 1
    buffer = np.empty((lead + count) * dtype.itemsize + shift, np.uint8)
    elements = buffer[shift:].view(dtype)
    if dtype.kind in "iu":
        elements[:] = np.iinfo(dtype).max
    else:
        elements[:] = True if dtype.kind == "b" else np.nan
    buffer[:shift] = 0xFF
    return buffer, elements[lead:].reshape(sizes)


def around(view: np.ndarray, buffer: np.ndarray) -> bytes:
    """What lies in the buffer beside the view."""
    values = view.copy()
    view[...] = 0
    beside = buffer.tobytes()
    view[...] = values
    return beside
