"""Sequences of a call: lengths and offsets read from the tables, and the check of the tables' values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import CacheOverflow
from .problem import Problem

Table = npt.NDArray[np.int32]
Tables = Mapping[str, Table | None]
Lengths = npt.NDArray[np.int64]


class Sequence(NamedTuple):
    """Sequence of a call: lengths in use, first key slot, position of query 0, and offsets in the arrays."""

    number: int  # index in the batch
    n_q: int
    n_k: int
    leftpad: int
    offset: int
    row_q: int  # first row in packed q
    row_k: int  # first row in packed k and v
    batch_k: int  # batch entry of dense k and v

    def positions(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Return the positions of queries [start, stop)."""
        return np.arange(start, self.n_q if stop is None else stop, dtype=np.int64) + self.offset


def sequences(problem: Problem, tables: Tables) -> Iterator[Sequence]:
    """Yield every sequence of the call, in order."""
    cu_q, cu_k = tables.get("cu_seqlens_q"), tables.get("cu_seqlens_k")

    def entry(name: str, b: int, default: int) -> int:
        table = tables.get(name)
        return default if table is None else int(table[b])

    for b in range(problem.batch):
        row_q = 0 if cu_q is None else int(cu_q[b])
        row_k = 0 if cu_k is None else int(cu_k[b])
        n_q = entry("seqused_q", b, problem.seqlen_q if cu_q is None else int(cu_q[b + 1]) - row_q)
        n_k = entry("seqused_k", b, problem.seqlen_k if cu_k is None else int(cu_k[b + 1]) - row_k)
        leftpad = entry("leftpad_k", b, 0)
        aligned = n_k - leftpad - n_q if problem.alignment == "bottom-right" else 0
        yield Sequence(
            number=b,
            n_q=n_q,
            n_k=n_k,
            leftpad=leftpad,
            offset=entry("offset", b, aligned),
            row_q=row_q,
            row_k=row_k,
            batch_k=entry("cache_batch_idx", b, b),
        )


def check_tables(problem: Problem, tables: Tables) -> None:
    """Check the values of every table in host memory before any computation.

    Raises:
        ValueError: the message names the table, the entry and the accepted range.
    """
    rows_q = _check_cumulative("cu_seqlens_q", tables, problem.q.shape[0], problem.seqlen_q)
    rows_k = _check_cumulative("cu_seqlens_k", tables, problem.k.shape[0], problem.seqlen_k)
    _check_range("seqused_q", tables, 0, problem.seqlen_q if rows_q is None else rows_q)
    _check_range("seqused_k", tables, 0, problem.seqlen_k if rows_k is None else rows_k, pages=problem.paged)
    used = _used(tables, problem, rows_k)
    _check_range("leftpad_k", tables, 0, used)
    _check_range("cache_batch_idx", tables, 0, problem.k.shape[0] - 1)
    pages = tables.get("block_table")
    if pages is not None:
        check_pages(pages, used, problem.page_size, problem.k.shape[0])
    if tables.get("kv_indices") is not None:
        _check_kv_indices(problem, tables, rows_k)


def _used(tables: Tables, problem: Problem, rows_k: Lengths | None) -> Lengths:
    """Return the number of keys in use per sequence."""
    table = tables.get("seqused_k")
    if table is not None:
        return table.astype(np.int64)
    return np.full(problem.batch, problem.seqlen_k, np.int64) if rows_k is None else rows_k


def _check_kv_indices(problem: Problem, tables: Tables, rows_k: Lengths | None) -> None:
    """Check the lists of queries in use. Lists of unused queries may hold any values."""
    indices = tables["kv_indices"]
    assert indices is not None
    least = problem.seqlen_k if rows_k is None else int(rows_k.min(initial=problem.seqlen_k))
    if indices.min(initial=-1) >= -1 and indices.max(initial=-1) < max(least, 0):
        return
    for sequence in sequences(problem, tables):
        slots = problem.seqlen_k if rows_k is None else int(rows_k[sequence.number])
        lists = selected_keys(problem, sequence, indices)
        bad = (lists < -1) | (lists >= slots)
        if bad.any():
            _, row, entry = (int(x) for x in np.argwhere(bad)[0])
            raise ValueError(
                f"kv_indices must be from -1 (no key) to {slots - 1}, got {lists[bad][0]} "
                f"for sequence {sequence.number}, query {row}, entry {entry}."
            )


def selected_keys(problem: Problem, sequence: Sequence, kv_indices: Table) -> Table:
    """Return a view of the lists of a sequence's queries in use: (nheads_kv, n_q, n), or (1, n_q, n) for all heads."""
    if problem.packed_q:
        lists = kv_indices[..., sequence.row_q : sequence.row_q + sequence.n_q, :]
    else:
        lists = kv_indices[sequence.number][..., : sequence.n_q, :]
    return lists if lists.ndim == 3 else lists[None]


def is_listed(lists: Table, n_k: int) -> npt.NDArray[np.bool_]:
    """Return booleans (..., n_k): the keys that each list (..., n) names. Entries outside [0, n_k) are ignored."""
    found = np.zeros((*lists.shape[:-1], n_k + 1), np.bool_)
    np.put_along_axis(found, np.where((lists >= 0) & (lists < n_k), lists, n_k), True, axis=-1)
    return found[..., :n_k]


def _check_cumulative(name: str, tables: Tables, total: int, longest: int) -> Lengths | None:
    """Return the lengths from a cumulative table, or None without such a table."""
    table = tables.get(name)
    if table is None:
        return None
    lengths: Lengths = np.subtract(table[1:], table[:-1], dtype=np.int64)
    if (lengths < 0).any():
        b = int(np.argmax(lengths < 0))
        raise ValueError(f"{name} must not decrease, got {table[b]} before {table[b + 1]} at entry {b + 1}.")
    if table[0] < 0 or table[-1] > total:
        raise ValueError(f"{name} must be from 0 to {total} (rows of the packed array), got {table[0]} to {table[-1]}.")
    if lengths.size and lengths.max() > longest:
        limit = name.replace("cu_seqlens", "max_seqlen")
        raise ValueError(f"{limit} must be at least {lengths.max()}, the longest length in {name}, got {longest}.")
    return lengths


def _check_range(name: str, tables: Tables, low: int, high: int | Lengths, *, pages: bool = False) -> None:
    table = tables.get(name)
    if table is None:
        return
    bad = (table < low) | (table > high)
    if bad.any():
        b = int(np.argmax(bad))
        limit = int(np.broadcast_to(high, table.shape)[b])
        text = f"{name}[{b}] must be from {low} to {limit}"
        found = f"got {table[b]}."
        if pages:
            raise CacheOverflow(f"{text} (block_table columns * page_size), {found}")
        raise ValueError(f"{text}, {found}")


def check_pages(pages: Table, used: Lengths, page_size: int, num_pages: int) -> None:
    """Check the page numbers in use. Entries beyond a sequence's pages in use may hold any values."""
    if pages.size == 0:
        return
    in_use = np.arange(pages.shape[1])[None, :] * page_size < np.asarray(used)[:, None]
    bad = in_use & ((pages < 0) | (pages >= num_pages))
    if bad.any():
        b, entry = (int(x) for x in np.argwhere(bad)[0])
        accepted = f"a page from 0 to {num_pages - 1}"
        raise ValueError(f"block_table[{b}, {entry}] must be {accepted}, got {pages[b, entry]}.")
