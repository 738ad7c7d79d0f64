"""Rules of an append to a KV cache: metadata, checked for every Problem of the APPEND pass, and values of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from . import quantised
from .dtypes import ATTENTION_DTYPES, QUANTISED
from .errors import CacheOverflow
from .problem import Array
from .sequences import Tables, check_pages

LABELS = {"k": "k_cache", "v": "v_cache", "new_k": "k", "new_v": "v"}  # the caller's names
Given = Mapping[str, Array]


def check_arrays(given: Given) -> None:
    """Check the metadata of an append; raise a ValueError or TypeError that names the argument."""
    for name in ("q", "k", "v", "new_k", "new_v", "cache_seqlens"):
        if name not in given:
            label = LABELS.get(name, name)
            accepted = "an int or an array" if name == "cache_seqlens" else "an array"
            raise ValueError(f"{label} must be {accepted}, got None. An append needs k, v and cache_seqlens.")
    _check_shapes(given)
    quantised.check_appendable(given)
    _check_tables(given)
    _check_memory(given)
    _check_rotary(given)


def _check_shapes(given: Given) -> None:
    q, cache, cache_v, new_k, new_v = large = [given[name] for name in ("q", "k", "v", "new_k", "new_v")]
    stored = {cache.dtype, cache_v.dtype}
    if q.dtype not in ATTENTION_DTYPES or not (stored == {q.dtype} or (len(stored) == 1 and stored <= {*QUANTISED})):
        found, accepted = ", ".join(x.dtype for x in large), ", ".join(ATTENTION_DTYPES)
        raise TypeError(
            f"q, k_cache, v_cache, k and v must have one dtype of {accepted}, or k_cache and v_cache one of "
            f"{', '.join(QUANTISED)}, got {found}."
        )
    if any(x.dtype != q.dtype for x in (new_k, new_v)):
        raise TypeError(f"k and v must have q's dtype {q.dtype}, got {new_k.dtype}, {new_v.dtype}.")
    quantised.check_given(given)
    if any(len(x.shape) != 4 for x in large):
        raise ValueError(
            f"k and v must be (batch, seqlen_new, nheads_kv, head_dim), got k {new_k.shape}, v {new_v.shape}."
        )
    want = (q.shape[0], new_k.shape[1], cache.shape[2])
    if new_k.shape != (*want, cache.shape[3]) or new_v.shape != (*want, cache_v.shape[3]):
        raise ValueError(
            f"k and v must be (batch, seqlen_new, nheads_kv, head_dim) like the cache {cache.shape}, {cache_v.shape}, "
            f"got k {new_k.shape}, v {new_v.shape} for q {q.shape}."
        )


def _check_tables(given: Given) -> None:
    batch, cache, lengths = given["q"].shape[0], given["k"], given["cache_seqlens"]
    entries, pages = given.get("cache_batch_idx"), given.get("block_table")
    if entries is not None and (entries.shape != (batch,) or pages is not None):
        raise ValueError(f"cache_batch_idx must be ({batch},), without block_table, got {entries.shape}.")
    if pages is not None and (len(pages.shape) != 2 or pages.shape[0] != batch):
        raise ValueError(f"block_table must be (batch, max_pages) with batch {batch}, got {pages.shape}.")
    if entries is None and pages is None and cache.shape[0] != batch:
        raise ValueError(f"k_cache must have q's batch {batch} as its first dimension, got {cache.shape}.")
    if lengths.shape != (batch,) or lengths.dtype != "int32":
        raise ValueError(f"cache_seqlens must be an int or int32 ({batch},), got {lengths.shape}.")


def _check_memory(given: Given) -> None:
    for name in ("k", "v", "k_scale", "v_scale"):
        if name not in given:
            continue
        cache = given[name]
        axes = [
            axis for axis, (n, step) in enumerate(zip(cache.shape, cache.strides, strict=True)) if n > 1 and not step
        ]
        if axes and 0 not in cache.shape:
            raise ValueError(
                f"{LABELS.get(name, name)} must not be expanded, because new entries would overwrite each other, "
                f"got strides {cache.strides} for {cache.shape}. Pass a copy."
            )


def _check_rotary(given: Given) -> None:
    q, cos, sin = given["q"], given.get("rotary_cos"), given.get("rotary_sin")
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be passed together, got one of them.")
    if cos is None or sin is None:
        return
    if len(cos.shape) != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"rotary_cos and rotary_sin must be (positions, rotary_dim / 2), "
            f"rotary_dim <= head_dim {q.shape[3]}, got {cos.shape}, {sin.shape}."
        )
    for name, array in (("rotary_cos", cos), ("rotary_sin", sin)):
        if array.dtype not in (q.dtype, "float32"):
            raise TypeError(f"{name} must be {q.dtype} or float32, got {array.dtype}.")


def slots(given: Given) -> int:
    """Return the number of keys that the cache of one sequence can hold."""
    pages, page_size = given.get("block_table"), given["k"].shape[1]
    return page_size if pages is None else pages.shape[1] * page_size


class AppendLimits(NamedTuple):
    """Limits for the values of an append. `positions`: length of the rotary tables, 0 without them."""

    seqlen_new: int
    slots: int
    entries: int  # batch entries or pages of the cache
    page_size: int
    positions: int
    positions_needed: int  # beyond cache_seqlens


def append_limits(given: Given, *, by_row: bool) -> AppendLimits:
    """Return the limits for the values of an append."""
    q, cache, cos = given["q"], given["k"], given.get("rotary_cos")
    seqlen_new = given["new_k"].shape[1]
    rows = max(seqlen_new, q.shape[1] if by_row else min(q.shape[1], 1))
    positions, needed = (0, 0) if cos is None else (cos.shape[0], rows)
    page_size = cache.shape[1] if "block_table" in given else 0
    return AppendLimits(seqlen_new, slots(given), cache.shape[0], page_size, positions, needed)


def check_append(sizes: AppendLimits, tables: Tables) -> None:
    """Check the values of tables in host memory before anything is written."""
    lengths, entries, pages = (tables.get(name) for name in ("cache_seqlens", "cache_batch_idx", "block_table"))
    if lengths is None or lengths.size == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high + sizes.seqlen_new > sizes.slots:
        raise CacheOverflow(
            f"cache_seqlens plus {sizes.seqlen_new} new keys must be from 0 to {sizes.slots} "
            f"({'block_table columns * page_size' if sizes.page_size else 'the size of the cache'}), "
            f"got cache_seqlens from {low} to {high}."
        )
    if sizes.positions_needed and high + sizes.positions_needed > sizes.positions:
        needed = high + sizes.positions_needed
        raise ValueError(f"rotary_cos must have at least {needed} positions, got {sizes.positions}.")
    if entries is not None and (entries.min() < 0 or entries.max() >= sizes.entries):
        found = f"got {entries.min()} to {entries.max()}."
        raise ValueError(f"cache_batch_idx must be from 0 to {sizes.entries - 1}, {found}")
    if pages is not None:
        check_pages(pages, lengths.astype("int64") + sizes.seqlen_new, sizes.page_size, sizes.entries)
