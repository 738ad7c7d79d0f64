"""Pairs of queries and keys that two ranks have, and the part of each pair that the mask leaves visible.

Query i has the position p = i + offset, key j has the position c = j - leftpad, so p - c = i - j + shift with shift =
offset + leftpad. A document is one sequence of a packed call, or all sequences of a dense call together. The bounds of
a document hold for all of its sequences, so a pair may contain keys that no query attends to, but it misses none.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .sharding import Interval

UNBOUNDED = 2**62


class Piece(NamedTuple):
    """Rows of a rank from `row` on, with the positions start, start + step, ... in a document."""

    document: int
    start: int
    length: int
    step: int
    row: int

    @property
    def last(self) -> int:
        return self.start + (self.length - 1) * self.step

    def clip(self, low: int, high: int) -> Piece | None:
        """Return the part with positions in [low, high), or None if it is empty."""
        first = max(0, -((self.start - low) // self.step))
        stop = min(self.length, -((self.start - high) // self.step))
        if stop <= first:
            return None
        start = self.start + first * self.step
        return Piece(self.document, start, stop - first, self.step, self.row + first)


class Document(NamedTuple):
    """Bounds over the sequences of a document: queries in use, keys in use, and shift."""

    queries: int
    first_key: int
    keys: int
    least_shift: int
    largest_shift: int


class Band(NamedTuple):
    """Mask of positions: -right <= p - c <= left, and the same chunk of positions if chunk > 0."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    chunk: int = 0


class Pair(NamedTuple):
    """One call of attention: queries, keys, and the chunk that applies (0: none)."""

    queries: Piece
    keys: Piece
    chunk: int


def pieces(intervals: Sequence[Interval], cu_seqlens: Sequence[int]) -> tuple[Piece, ...]:
    """Return the pieces of one rank. Document d has the global positions [cu_seqlens[d], cu_seqlens[d + 1])."""
    found: list[Piece] = []
    row = 0
    for start, length, step in intervals:
        whole = Piece(0, start, length, step, row)
        for number in _documents(cu_seqlens, whole.start, whole.last):
            part = whole.clip(cu_seqlens[number], cu_seqlens[number + 1])
            if part is not None:
                found.append(part._replace(document=number, start=part.start - cu_seqlens[number]))
        row += length
    return tuple(found)


def _documents(cu_seqlens: Sequence[int], first: int, last: int) -> range:
    """Return the documents that may contain positions in [first, last]."""
    stop = min(len(cu_seqlens) - 1, bisect_left(cu_seqlens, last + 1))
    return range(max(0, bisect_right(cu_seqlens, first) - 1), stop)


def visible_keys(q: Piece, document: Document, band: Band) -> tuple[int, int]:
    """Return the bounds [low, high) of the keys that the queries may attend to."""
    low = max(document.first_key, q.start + document.least_shift - band.left)
    high = min(document.keys, q.last + document.largest_shift + band.right + 1)
    if band.chunk:
        first, last = q.start + document.least_shift, q.last + document.largest_shift
        low = max(low, first // band.chunk * band.chunk)
        high = min(high, last // band.chunk * band.chunk + band.chunk)
    return low, high


def visible_queries(k: Piece, document: Document, band: Band) -> tuple[int, int]:
    """Return the bounds [low, high) of the queries that may attend to the keys."""
    low, high = k.start - band.right - document.largest_shift, k.last + band.left - document.least_shift + 1
    if band.chunk:
        low = max(low, k.start // band.chunk * band.chunk - document.largest_shift)
        high = min(high, k.last // band.chunk * band.chunk + band.chunk - document.least_shift)
    return max(low, 0), min(high, document.queries)


def pairs(
    queries: Iterable[Piece], keys: Iterable[Piece], documents: Sequence[Document], band: Band
) -> tuple[Pair, ...]:
    """Return the pairs with visible entries, in a fixed order."""
    by_document: dict[int, list[Piece]] = {}
    for piece in keys:
        by_document.setdefault(piece.document, []).append(piece)
    found: list[Pair] = []
    for q in queries:
        document = documents[q.document]
        used = q.clip(0, document.queries)
        if used is None:
            continue
        for candidate in by_document.get(q.document, ()):
            k = candidate.clip(*visible_keys(used, document, band))
            if k is not None:
                found += _chunked(used, k, document, band)
    return tuple(found)


def _chunked(q: Piece, k: Piece, document: Document, band: Band) -> list[Pair]:
    """Return the pairs of (q, k). A chunk is divided where it starts before the keys.

    A call counts positions from the first key, so its chunks match the whole sequence only if the first key starts a
    chunk.
    """
    if not band.chunk:
        return _pair(q, k, document, band, 0)
    border = -(-k.start // band.chunk) * band.chunk
    found: list[Pair] = []
    for part, chunk in ((k.clip(k.start, border), 0), (k.clip(border, UNBOUNDED), band.chunk)):
        if part is not None:
            found += _pair(q, part, document, band, chunk)
    return found


def _pair(q: Piece, k: Piece, document: Document, band: Band, chunk: int) -> list[Pair]:
    visible = q.clip(*visible_queries(k, document, band))
    return [] if visible is None else [Pair(visible, k, chunk)]


def needed(
    queries: Sequence[Piece], keys: Sequence[Piece], documents: Sequence[Document], band: Band
) -> tuple[Piece, ...]:
    """Return the parts of the keys that some query may attend to, in the order of their rows."""
    ranges: dict[Piece, list[tuple[int, int]]] = {}
    by_document: dict[int, list[Piece]] = {}
    for q in queries:
        used = q.clip(0, documents[q.document].queries)
        if used is not None:
            by_document.setdefault(q.document, []).append(used)
    for k in keys:
        for q in by_document.get(k.document, ()):
            part = k.clip(*visible_keys(q, documents[q.document], band))
            if part is not None and q.clip(*visible_queries(part, documents[q.document], band)) is not None:
                ranges.setdefault(k, []).append((part.start, part.last + 1))
    found: list[Piece] = []
    for k, bounds in ranges.items():
        for low, high in _union(bounds):
            part = k.clip(low, high)
            assert part is not None
            found.append(part)
    return tuple(sorted(found, key=lambda piece: piece.row))


def _union(bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of half-open ranges as disjoint ranges."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(bounds):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found
