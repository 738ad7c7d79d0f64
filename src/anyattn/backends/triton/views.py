"""What kernels receive: arrays and scalars in named tuples. An absent part is None, and its code is not compiled."""

from __future__ import annotations

from typing import Any, NamedTuple


class View(NamedTuple):
    """An array (batch, row, head, dim): its address and its strides in elements; dim is contiguous. lse has no dim."""

    pointer: Any
    batch: Any
    row: Any
    head: Any


class Dense(NamedTuple):
    """A bias or mask (batch, head, row, key); stride 0 along axes that are broadcast."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    key: Any


class Heads(NamedTuple):
    """Numbers per query head: ALiBi slopes (stride 0 along a missing batch axis) and sinks."""

    slopes: Any
    slopes_batch: Any
    sink: Any


class Tables(NamedTuple):
    """int32 tables, one entry per sequence."""

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
    """Runtime sizes. rows_q: of packed q; rows_k, entries_k: of k, whose first two axes they are."""

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
    """The mask's bounds. See mask.Mask."""

    left: Any
    right: Any
    chunk: Any


class Scalars(NamedTuple):
    """How a product becomes a score."""

    scale: Any
    softcap: Any


class Dropout(NamedTuple):
    """Philox's state, the threshold and the factor of what is kept. See philox.py."""

    state: Any
    threshold: Any
    factor: Any


class Schedule(NamedTuple):
    """How programs are ordered: tiles of rows per head, heads whose keys share the L2 cache, splits of the keys and how
    far apart their parts of out and lse lie."""

    tiles: Any
    section: Any
    splits: Any
    out_split: Any
    lse_split: Any
