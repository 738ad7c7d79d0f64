"""The rules of an append to a KV cache: metadata, which a Problem of the APPEND pass fulfils, and values of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .dtypes import ATTENTION_DTYPES
from .errors import CacheOverflow
from .problem import Array
from .sequences import Tables, check_pages

LABELS = {"k": "k_cache", "v": "v_cache", "new_k": "k", "new_v": "v"}  # the caller's names
Given = Mapping[str, Array]


def check_arrays(given: Given) -> None:
    """Check the metadata of an append; raise ValueError or TypeError that names the argument."""
    for name in ("q", "k", "v", "new_k", "new_v", "cache_seqlens"):
        if name not in given:
            label = LABELS.get(name, name)
            raise ValueError(f"{label} is None: appending needs k, v and cache_seqlens (an int or one per sequence)")
    _check_shapes(given)
    _check_tables(given)
    _check_memory(given)
    _check_rotary(given)


def _check_shapes(given: Given) -> None:
    q, cache, cache_v, new_k, new_v = large = [given[name] for name in ("q", "k", "v", "new_k", "new_v")]
    if q.dtype not in ATTENTION_DTYPES or any(x.dtype != q.dtype for x in large):
        found, accepted = ", ".join(x.dtype for x in large), ", ".join(ATTENTION_DTYPES)
        raise TypeError(f"q, k_cache, v_cache, k and v must have one dtype of {accepted}; got {found}")
    if any(len(x.shape) != 4 for x in large):
        raise ValueError(
            f"k and v must be (batch, seqlen_new, nheads_kv, head_dim); got k {new_k.shape}, v {new_v.shape}"
        )
    want = (q.shape[0], new_k.shape[1], cache.shape[2])
    if new_k.shape != (*want, cache.shape[3]) or new_v.shape != (*want, cache_v.shape[3]):
        raise ValueError(
            f"k and v must be (batch, seqlen_new, nheads_kv, head_dim) like the cache {cache.shape}, {cache_v.shape}; "
            f"got k {new_k.shape}, v {new_v.shape} for q {q.shape}"
        )


def _check_tables(given: Given) -> None:
    batch, cache, lengths = given["q"].shape[0], given["k"], given["cache_seqlens"]
    entries, pages = given.get("cache_batch_idx"), given.get("block_table")
    if entries is not None and (entries.shape != (batch,) or pages is not None):
        raise ValueError(f"cache_batch_idx must be ({batch},), without block_table; got {entries.shape}")
    if pages is not None and (len(pages.shape) != 2 or pages.shape[0] != batch):
        raise ValueError(f"block_table must be (batch, max_pages) with batch {batch}; got {pages.shape}")
    if entries is None and pages is None and cache.shape[0] != batch:
        raise ValueError(f"k_cache must have q's batch {batch} as its first dimension; got {cache.shape}")
    if lengths.shape != (batch,) or lengths.dtype != "int32":
        raise ValueError(f"cache_seqlens must be an int or int32 ({batch},); got {lengths.shape}")


def _check_memory(given: Given) -> None:
    for name in ("k", "v"):
        cache = given[name]
        axes = [
            axis for axis, (n, step) in enumerate(zip(cache.shape, cache.strides, strict=True)) if n > 1 and not step
        ]
        if axes and 0 not in cache.shape:
            raise ValueError(
                f"{LABELS[name]} is expanded along axis {axes[0]}, so that new entries would overwrite each other; "
                f"got strides {cache.strides} for {cache.shape}"
            )


def _check_rotary(given: Given) -> None:
    q, cos, sin = given["q"], given.get("rotary_cos"), given.get("rotary_sin")
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None or sin is None:
        return
    if len(cos.shape) != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"rotary_cos and rotary_sin must be (positions, rotary_dim / 2), "
            f"rotary_dim <= head_dim {q.shape[3]}; got {cos.shape}, {sin.shape}"
        )
    for name, array in (("rotary_cos", cos), ("rotary_sin", sin)):
        if array.dtype not in (q.dtype, "float32"):
            raise TypeError(f"{name} has dtype {array.dtype}; accepted here: {q.dtype}, float32")


def slots(given: Given) -> int:
    """Return how many keys one sequence's cache can hold."""
    pages, page_size = given.get("block_table"), given["k"].shape[1]
    return page_size if pages is None else pages.shape[1] * page_size


class Room(NamedTuple):
    """The sizes that an append's values must respect. `positions`: of the rotary tables, 0 without."""

    seqlen_new: int
    slots: int
    entries: int  # batch entries or pages of the cache
    page_size: int
    positions: int
    positions_needed: int  # beyond cache_seqlens


def room(given: Given, *, by_row: bool) -> Room:
    """Return the sizes that an append's values must respect."""
    q, cache, cos = given["q"], given["k"], given.get("rotary_cos")
    seqlen_new = given["new_k"].shape[1]
    rows = max(seqlen_new, q.shape[1] if by_row else min(q.shape[1], 1))
    positions, needed = (0, 0) if cos is None else (cos.shape[0], rows)
    page_size = cache.shape[1] if "block_table" in given else 0
    return Room(seqlen_new, slots(given), cache.shape[0], page_size, positions, needed)


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
