"""Blocks of a mask function: empty, mixed or full, decided by interval arithmetic for whole blocks at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .graph import Graph
from .interval_rules import Interval
from .intervals import Extremes, Range, bounds, check

EMPTY, MIXED, FULL = 0, 1, 2
PANEL = 2**17  # blocks that are examined together, which bounds the memory of intermediate results

Kinds = npt.NDArray[np.int8]


class Sizes(NamedTuple):
    """Sizes of a mask: batch, query heads, queries and keys."""

    batch: int
    nheads: int
    seqlen_q: int
    seqlen_k: int


def classify(graph: Graph, arrays: Sequence[Any], sizes: Sizes, block: tuple[int, int]) -> Kinds:
    """Return the kind of every block, (batch, nheads, q_blocks, k_blocks), in time proportional to their number.

    A block is EMPTY or FULL only if it is so for certain. A MIXED block may turn out to be either.

    Raises:
        ValueError: a read of a captured array may be out of bounds.
    """
    if 0 not in sizes:
        check(graph, Range(*[Interval(np.float64(0), np.float64(size - 1)) for size in sizes]), arrays)
    return kinds(graph, [Extremes(array) for array in arrays], sizes, block)


def kinds(graph: Graph, extremes: Sequence[Extremes], sizes: Sizes, block: tuple[int, int]) -> Kinds:
    """Return what `classify` returns, without its check. extremes: those of the arrays that the mask reads."""
    assert graph.mask is not None
    kv = _ranges(sizes.seqlen_k, block[1])
    q_low, q_high = _ranges(sizes.seqlen_q, block[0])
    found_kinds = np.empty((sizes.batch, sizes.nheads, len(q_low), len(kv.low)), np.int8)
    step = max(1, PANEL // max(1, len(kv.low)))
    for b, h in np.ndindex(sizes.batch, sizes.nheads):
        one, head = (Interval(np.float64(x), np.float64(x)) for x in (b, h))
        for start in range(0, len(q_low), step):
            panel = slice(start, start + step)
            q = Interval(q_low[panel, None], q_high[panel, None])
            found = bounds(graph, (graph.mask,), Range(one, head, q, kv), extremes)[graph.mask]
            low, high = (np.asarray(x, np.int8) for x in found)
            found_kinds[b, h, panel] = low + high
    return found_kinds


def _ranges(size: int, block: int) -> Interval:
    """Return the first and the last index of every block."""
    starts = np.arange(0, size, block, dtype=np.float64)
    return Interval(starts, np.minimum(starts + block, size) - 1)
