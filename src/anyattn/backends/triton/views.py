"""Arguments of kernels: arrays and scalars in named tuples. A part that is None is not compiled."""

from __future__ import annotations

from typing import Any, NamedTuple


class View(NamedTuple):
    """Array (batch, row, head, dim): its address and its strides in elements. dim is contiguous; lse has no dim."""

    pointer: Any
    batch: Any
    row: Any
    head: Any


class Dense(NamedTuple):
    """Bias or mask (batch, head, row, key); stride 0 along broadcast axes."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    key: Any


class Heads(NamedTuple):
    """Values per query head: ALiBi slopes (stride 0 along a missing batch axis) and sinks."""

    slopes: Any
    slopes_batch: Any
    sink: Any


class Tables(NamedTuple):
    """Tables in int32, one entry per sequence."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    leftpad_k: Any
    offset: Any
    block_table: Any
    cache_batch_idx: Any
    max_pages: Any


class Sizes(NamedTuple):
    """Sizes at run time. rows_q: of packed q; entries_k, rows_k: the first two axes of k."""

    batch: Any
    seqlen_q: Any
    seqlen_k: Any
    nheads: Any
    group: Any
    rows_q: Any
    rows_k: Any
    entries_k: Any
    page_size: Any


class Interval(NamedTuple):
    """Bounds of the mask; see mask.Mask."""

    left: Any
    right: Any
    chunk: Any


class Scalars(NamedTuple):
    """Scalars that turn a product into a score."""

    scale: Any
    softcap: Any


class Dropout(NamedTuple):
    """Philox state, threshold, and the factor of kept entries; see philox.py."""

    state: Any
    threshold: Any
    factor: Any


class Schedule(NamedTuple):
    """Order of programs: tiles of queries per head, heads whose keys share the L2 cache, splits of the keys.

    The strides are the distances between the splits' parts of out and lse."""

    tiles: Any
    section: Any
    splits: Any
    out_split: Any
    lse_split: Any
