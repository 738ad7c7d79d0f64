"""What appending to a KV cache asks for, and its validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .errors import CacheOverflow
from .problem import DTYPES, Array
from .sequences import Tables, check_pages

ARRAYS = (
    "q",
    "k",
    "v",
    "new_k",
    "new_v",
    "rotary_cos",
    "rotary_sin",
    "cache_seqlens",
    "cache_batch_idx",
    "block_table",
)


LABELS = {"k": "k_cache", "v": "v_cache", "new_k": "k", "new_v": "v"}  # the caller's names


@dataclass(frozen=True)  # no tuple: torch 2.6 compiles none with properties
class Append:
    """Metadata of one append: new keys are rotated and written behind `cache_seqlens`.

    `by_row`: q row i is rotated at cache_seqlens + i (causal or windowed), else every row at cache_seqlens.
    """

    q: Array
    k: Array  # the cache: (batch, slots, nheads_kv, head_dim) or (num_pages, page_size, nheads_kv, head_dim)
    v: Array
    new_k: Array
    new_v: Array
    rotary_cos: Array | None  # (positions, rotary_dim / 2)
    rotary_sin: Array | None
    cache_seqlens: Array
    cache_batch_idx: Array | None
    block_table: Array | None
    interleaved: bool
    by_row: bool

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def seqlen_new(self) -> int:
        return self.new_k.shape[1]

    @property
    def rotary_dim(self) -> int:
        return 0 if self.rotary_cos is None else 2 * self.rotary_cos.shape[1]

    @property
    def page_size(self) -> int:
        return 0 if self.block_table is None else self.k.shape[1]

    @property
    def slots(self) -> int:
        """Keys that one sequence's cache can hold."""
        return self.k.shape[1] if self.block_table is None else self.block_table.shape[1] * self.k.shape[1]


def make_append(arrays: Mapping[str, Array | None], *, interleaved: bool, by_row: bool) -> Append:
    """Validates the metadata of an append; raises ValueError or TypeError that names the argument."""
    given = {name: arrays.get(name) for name in ARRAYS}
    for name in ("q", "k", "v", "new_k", "new_v", "cache_seqlens"):
        if given[name] is None:
            label = LABELS.get(name, name)
            raise ValueError(f"{label} is None: appending needs k, v and cache_seqlens (an int or one per sequence)")
    append = Append(**given, interleaved=interleaved, by_row=by_row)  # type: ignore[arg-type]
    _check_shapes(append)
    _check_memory(append)
    _check_rotary(append)
    return append


def _check_shapes(append: Append) -> None:
    cache, new_k, new_v = append.k, append.new_k, append.new_v
    if append.q.dtype not in DTYPES or any(x.dtype != append.q.dtype for x in (cache, append.v, new_k, new_v)):
        found = ", ".join(x.dtype for x in (append.q, cache, append.v, new_k, new_v))
        raise TypeError(f"q, k_cache, v_cache, k and v must have one dtype of {', '.join(DTYPES)}; got {found}")
    if any(len(x.shape) != 4 for x in (append.q, cache, append.v, new_k, new_v)):
        raise ValueError(
            f"k and v must be (batch, seqlen_new, nheads_kv, head_dim); got k {new_k.shape}, v {new_v.shape}"
        )
    want = (append.batch, new_k.shape[1], cache.shape[2])
    if new_k.shape != (*want, cache.shape[3]) or new_v.shape != (*want, append.v.shape[3]):
        raise ValueError(
            f"k and v must be (batch, seqlen_new, nheads_kv, head_dim) like the cache {cache.shape}, {append.v.shape}; "
            f"got k {new_k.shape}, v {new_v.shape} for q {append.q.shape}"
        )
    entries, pages = append.cache_batch_idx, append.block_table
    if entries is not None and (entries.shape != (append.batch,) or pages is not None):
        raise ValueError(f"cache_batch_idx must be ({append.batch},), without block_table; got {entries.shape}")
    if pages is not None and (len(pages.shape) != 2 or pages.shape[0] != append.batch):
        raise ValueError(f"block_table must be (batch, max_pages) with batch {append.batch}; got {pages.shape}")
    if entries is None and pages is None and cache.shape[0] != append.batch:
        raise ValueError(f"k_cache must have q's batch {append.batch} as its first dimension; got {cache.shape}")
    if append.cache_seqlens.shape != (append.batch,) or append.cache_seqlens.dtype != "int32":
        raise ValueError(f"cache_seqlens must be an int or int32 ({append.batch},); got {append.cache_seqlens.shape}")


def _check_memory(append: Append) -> None:
    for name, cache in (("k_cache", append.k), ("v_cache", append.v)):
        axes = [
            axis for axis, (n, step) in enumerate(zip(cache.shape, cache.strides, strict=True)) if n > 1 and not step
        ]
        if axes and 0 not in cache.shape:
            raise ValueError(
                f"{name} is expanded along axis {axes[0]}, so that new entries would overwrite each other; got strides "
                f"{cache.strides} for {cache.shape}"
            )


def _check_rotary(append: Append) -> None:
    cos, sin = append.rotary_cos, append.rotary_sin
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None or sin is None:
        return
    if len(cos.shape) != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > append.q.shape[3]:
        raise ValueError(
            f"rotary_cos and rotary_sin must be (positions, rotary_dim / 2), "
            f"rotary_dim <= head_dim {append.q.shape[3]}; got {cos.shape}, {sin.shape}"
        )
    for name, array in (("rotary_cos", cos), ("rotary_sin", sin)):
        if array.dtype not in (append.q.dtype, "float32"):
            raise TypeError(f"{name} has dtype {array.dtype}; accepted here: {append.q.dtype}, float32")


class Room(NamedTuple):
    """The sizes that an append's values must respect. `positions`: of the rotary tables, 0 without."""

    seqlen_new: int
    slots: int
    entries: int  # batch entries or pages of the cache
    page_size: int
    positions: int
    positions_needed: int  # beyond cache_seqlens


def room(append: Append) -> Room:
    rows = max(append.seqlen_new, append.q.shape[1] if append.by_row else 1)
    positions, needed = (0, 0) if append.rotary_cos is None else (append.rotary_cos.shape[0], rows)
    return Room(append.seqlen_new, append.slots, append.k.shape[0], append.page_size, positions, needed)


def check_append(sizes: Room, tables: Tables) -> None:
    """Checks the values (host memory) before anything is written."""
    lengths, entries, pages = (tables.get(name) for name in ("cache_seqlens", "cache_batch_idx", "block_table"))
    if lengths is None or lengths.size == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high + sizes.seqlen_new > sizes.slots:
        raise CacheOverflow(
            f"cache_seqlens ({low} to {high}) plus {sizes.seqlen_new} new keys must lie in [0, {sizes.slots}], "
            + ("block_table columns * page_size" if sizes.page_size else "the size of the cache")
        )
    if sizes.positions_needed and high + sizes.positions_needed > sizes.positions:
        needed = high + sizes.positions_needed
        raise ValueError(f"rotary_cos has {sizes.positions} positions; this call needs {needed}")
    if entries is not None and (entries.min() < 0 or entries.max() >= sizes.entries):
        raise ValueError(f"cache_batch_idx must lie in [0, {sizes.entries}); got {entries.min()} to {entries.max()}")
    if pages is not None:
        check_pages(pages, lengths.astype("int64") + sizes.seqlen_new, sizes.page_size, sizes.entries)
