"""Plan of one rank: which keys it receives from which rank and sends to which, and the pairs that it computes.

A ring has a stage for each distance s: the rank receives keys from the rank s before it and sends its own keys to the
rank s after it. Keys come directly from the rank that has them, so that only the keys that the receiver's queries may
attend to are sent. "gather" receives all of them in one stage and computes longer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from .pairs import Band, Document, Pair, Piece, needed, pairs, pieces
from .sharding import Sharding

OWN = -1  # source of keys that the rank has already


class Transfer(NamedTuple):
    """Message with the keys of some pieces, from or to another rank."""

    peer: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.length for piece in self.pieces)


class Part(NamedTuple):
    """Consecutive rows of a stage's keys: from the rank's own keys (OWN) or from a received message."""

    source: int
    row: int
    length: int


class Stage(NamedTuple):
    """Messages of one exchange, the keys that are available after it, and the pairs to compute with them."""

    receive: tuple[Transfer, ...]
    send: tuple[Transfer, ...]
    parts: tuple[Part, ...]
    pairs: tuple[Pair, ...]

    @property
    def rows(self) -> int:
        return sum(part.length for part in self.parts)


class Layout(NamedTuple):
    """Shardings, documents and mask of a call, from which every rank makes its plan."""

    queries: Sharding
    keys: Sharding
    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    documents: tuple[Document, ...]
    band: Band


class Plan:
    """Stages of one rank, in the order in which every rank runs them."""

    def __init__(self, layout: Layout, rank: int, *, gather: bool) -> None:
        self.rank = rank
        self.rows_q = layout.queries.lengths()[rank]
        self.rows_k = layout.keys.lengths()[rank]
        ranks = range(layout.queries.world_size)
        self._documents, self._band = layout.documents, layout.band
        self._queries = {r: pieces(layout.queries.intervals[r], layout.cu_seqlens_q) for r in ranks}
        self._keys = {r: pieces(layout.keys.intervals[r], layout.cu_seqlens_k) for r in ranks}
        size = len(ranks)
        distances = [list(ranks)] if gather else [[s] for s in ranks]
        self.stages = tuple(self._stage([d % size for d in stage]) for stage in distances)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(pair for stage in self.stages for pair in stage.pairs)

    def received_rows(self) -> int:
        """Return the number of keys that the rank receives."""
        return sum(transfer.rows for stage in self.stages for transfer in stage.receive)

    def _needed(self, receiver: int, owner: int) -> tuple[Piece, ...]:
        return needed(self._queries[receiver], self._keys[owner], self._documents, self._band)

    def _stage(self, distances: Sequence[int]) -> Stage:
        size = len(self._queries)
        sources = [(self.rank - s) % size for s in distances if s]
        targets = [(self.rank + s) % size for s in distances if s]
        receive = [Transfer(peer, self._needed(self.rank, peer)) for peer in sources]
        send = [Transfer(peer, self._needed(peer, self.rank)) for peer in targets]
        receive = [transfer for transfer in receive if transfer.pieces]
        send = [transfer for transfer in send if transfer.pieces]
        available = [(index, piece) for index, transfer in enumerate(receive) for piece in _packed(transfer.pieces)]
        if 0 in distances:
            available += [(OWN, piece) for piece in self._needed(self.rank, self.rank)]
        parts, keys = _arranged(available)
        found = pairs(self._queries[self.rank], keys, self._documents, self._band)
        return Stage(tuple(receive), tuple(send), parts, found)


def _packed(found: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with their rows in a message that contains only them."""
    row, packed = 0, []
    for piece in found:
        packed.append(piece._replace(row=row))
        row += piece.length
    return packed


def _arranged(available: list[tuple[int, Piece]]) -> tuple[tuple[Part, ...], list[Piece]]:
    """Return the parts of a stage's keys in the order of positions, and the pieces in them, adjacent ones joined."""
    available = sorted(available, key=lambda entry: (entry[1].document, entry[1].start, entry[1].row))
    parts: list[Part] = []
    joined: list[Piece] = []
    row = 0
    for source, piece in available:
        if parts and parts[-1].source == source and parts[-1].row + parts[-1].length == piece.row:
            parts[-1] = parts[-1]._replace(length=parts[-1].length + piece.length)
        else:
            parts.append(Part(source, piece.row, piece.length))
        last = joined[-1] if joined else None
        if last and last.document == piece.document and last.step == piece.step == 1 and last.last + 1 == piece.start:
            joined[-1] = last._replace(length=last.length + piece.length)
        else:
            joined.append(piece._replace(row=row))
        row += piece.length
    return tuple(parts), joined


@lru_cache(maxsize=64)
def make_plan(layout: Layout, rank: int, *, gather: bool = False) -> Plan:
    """Return the plan of a rank; the same object for the same arguments."""
    return Plan(layout, rank, gather=gather)
