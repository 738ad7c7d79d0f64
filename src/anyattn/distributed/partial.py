"""Attention of one pair of queries and keys: one call on views, with the pair's place in its sequences."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..definition.inputs import Extras, Gradients, Inputs, Saved
from ..definition.options import Options
from ..frameworks.torch import functional
from .pairs import UNBOUNDED, Band, Pair, Piece
from .score_functions import Starts, captured_indices


class Sequences(NamedTuple):
    """Lengths of every sequence of the whole call, and the position of its query 0."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    leftpad: tuple[int, ...]
    offset: tuple[int, ...]


class Heads(NamedTuple):
    """Group of heads that a rank computes, of `parts` equal groups."""

    rank: int = 0
    parts: int = 1


class Static(NamedTuple):
    """Constants of a call, equal for all pairs."""

    options: Options  # scale, softcap, dropout_p, deterministic, score with starts
    band: Band
    sequences: Sequences
    packed: bool  # each document is one sequence
    heads: Heads
    backend: str


class Arrays(NamedTuple):
    """Optional arrays of the rank, rows by its queries; bias and mask have all keys of the whole sequence."""

    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    kv_indices: Tensor | None = None
    rng_state: Tensor | None = None
    used: Tensor | None = None  # (batch or 1, rows): queries in use
    captured: Tensor | None = None  # what score functions read
    captured_indices: Tensor | None = None


class Place(NamedTuple):
    """Place of a pair in its sequences, as arguments of a call. Tables are None if they change nothing."""

    offset: tuple[int, ...]
    seqused_q: tuple[int, ...] | None
    seqused_k: tuple[int, ...] | None
    leftpad_k: tuple[int, ...] | None
    left: int | None
    right: int | None
    chunk: int


@lru_cache(maxsize=4096)
def place(pair: Pair, sequences: Sequences, band: Band, *, packed: bool) -> Place:
    """Return the place of a pair, for the one sequence of its document or for all sequences."""
    q, k, chunk = pair
    numbers = [q.document] if packed else range(len(sequences.queries))
    used_q = tuple(_count(q, sequences.queries[s]) for s in numbers)
    used_k = tuple(_count(k, sequences.keys[s]) for s in numbers)
    pads = tuple(min(_count(k, sequences.leftpad[s]), used) for s, used in zip(numbers, used_k, strict=True))
    # p - c = step (i - j) + shift for the pair's own indices i and j
    shifts = [q.start - k.start + sequences.offset[s] + sequences.leftpad[s] for s in numbers]
    left, right, step = band.left, band.right, q.step if q.length > 1 else k.step
    if step > 1:
        left, right = ((left - shifts[0]) // step if left < UNBOUNDED else left), (
            (right + shifts[0]) // step if right < UNBOUNDED else right)  # fmt: skip
        shifts = [0 for _ in shifts]
    return Place(
        offset=tuple(shift - pad for shift, pad in zip(shifts, pads, strict=True)),
        seqused_q=used_q if min(used_q, default=q.length) < q.length else None,
        seqused_k=used_k if min(used_k, default=k.length) < k.length else None,
        leftpad_k=pads if any(pads) else None,
        left=None if left >= UNBOUNDED else left,
        right=None if right >= UNBOUNDED else right,
        chunk=chunk,
    )


def _count(piece: Piece, limit: int) -> int:
    """Return how many of the piece's positions are below the limit."""
    return min(piece.length, max(0, -((piece.start - limit) // piece.step)))


def forward(static: Static, pair: Pair, q: Tensor, k: Tensor, v: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a pair, (batch, rows, nheads, dim) and (batch, nheads, rows), in the compute dtype."""
    found = [functional.forward(inputs, options, None, static.backend) for inputs, options, _ in
             _calls(static, pair, q, k, v, arrays)]  # fmt: skip
    if not _is_numbered(static):
        return found[0]
    return torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found])


def backward(static: Static, pair: Pair, q: Tensor, k: Tensor, v: Tensor, arrays: Arrays, saved: Saved) -> Gradients:
    """Return the gradients of a pair, in the compute dtype. saved: for all rows of q."""
    rows = _slice(pair.queries)
    found = []
    for inputs, options, b in _calls(static, pair, q, k, v, arrays):
        given = saved.out[:, rows], saved.lse[..., rows], saved.dout[:, rows]
        dlse = None if saved.dlse is None else saved.dlse[..., rows]
        if b is not None:
            given, dlse = tuple(x[b] for x in given), None if dlse is None else dlse[b]
        found.append(functional.backward(Saved(*given, dlse), inputs, options, None, static.backend))
    if not _is_numbered(static):
        return found[0]
    return Gradients(*(torch.stack([getattr(grads, name) for grads in found]) for name in ("dq", "dk", "dv")))


def _is_numbered(static: Static) -> bool:
    """Return whether a sequence needs a number in the call, because dropout counts by sequence and head."""
    return static.options.dropout_p > 0 and (static.packed or static.heads.parts > 1)


def _calls(
    static: Static, pair: Pair, q: Tensor, k: Tensor, v: Tensor, arrays: Arrays
) -> list[tuple[Inputs, Options, int | None]]:
    """Return the calls of a pair: one, or one for each sequence if sequences need numbers."""
    found = place(pair, static.sequences, static.band, packed=static.packed)
    options = static.options._replace(
        left=found.left, right=found.right, chunk=found.chunk, partial=True,
        query_start=pair.queries.start, key_start=pair.keys.start,
    )  # fmt: skip
    if not options.dropout_p:
        options = options._replace(query_start=0, key_start=0)
    q, k, v = q[:, _slice(pair.queries)], k[:, _slice(pair.keys)], v[:, _slice(pair.keys)]
    extras = _extras(pair, arrays)
    if options.score:
        b, h = pair.queries.document if static.packed else 0, static.heads.rank * q.shape[2]
        starts = Starts(b, h, pair.queries.start, pair.keys.start, pair.queries.step, pair.keys.step)
        extras["captured"] = arrays.captured
        extras["captured_indices"] = captured_indices(arrays.captured_indices, starts, q.device)
    if not _is_numbered(static):
        for name in ("offset", "seqused_q", "seqused_k", "leftpad_k"):
            extras[name] = _table(getattr(found, name), q)
        return [(Inputs(q, k, v, Extras(**extras)), options, None)]
    return [(_numbered(static, pair, b, found, q, k, v, extras), options, b) for b in range(len(q))]


def _extras(pair: Pair, arrays: Arrays) -> dict[str, Any]:
    """Return the optional arrays of the pair's rows and keys."""
    rows, keys = _slice(pair.queries), pair.keys
    columns = slice(keys.start, keys.start + keys.length * keys.step, keys.step)
    found: dict[str, Any] = {"rng_state": arrays.rng_state}
    for name, x in (("bias", arrays.bias), ("mask", arrays.mask)):
        found[name] = None if x is None else scores_view(x, rows, columns)
    slopes = arrays.alibi_slopes
    if slopes is not None and slopes.ndim == 2 and len(slopes) > 1 and pair.queries.document:
        slopes = slopes[pair.queries.document : pair.queries.document + 1]
    found["alibi_slopes"] = slopes
    if arrays.kv_indices is not None:
        lists = arrays.kv_indices[..., rows, :] - keys.start
        inside = (lists >= 0) & (lists < keys.length * keys.step) & (lists % keys.step == 0)
        found["kv_indices"] = torch.where(inside, lists // keys.step, -1)
    return found


def scores_view(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return the rows and columns of a bias or mask, whole along broadcast axes."""
    if x.shape[2] > 1:
        x = x[:, :, rows]
    return x[..., columns] if x.shape[3] > 1 else x


def _numbered(
    static: Static, pair: Pair, b: int, found: Place, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any]
) -> Inputs:
    """Return sequence b as a packed sequence with the number that makes dropout count as in the whole call.

    Dropout counts by number * nheads + h. With `parts` groups of heads, sequence s of group g has the number
    s * parts + g. The sequences before it are empty.
    """
    number = (pair.queries.document if static.packed else b) * static.heads.parts + static.heads.rank

    def last(values: tuple[int, ...] | None) -> Tensor | None:
        return None if values is None else _table((0,) * number + (values[b],), q)

    slopes = extras["alibi_slopes"]
    if slopes is not None and slopes.ndim == 2:
        slopes = slopes[min(b, len(slopes) - 1)].expand(number + 1, -1)
    lists = extras.get("kv_indices")
    given = Extras(
        alibi_slopes=slopes, cu_seqlens_q=last_only(q[b], number), cu_seqlens_k=last_only(k[b], number),
        seqused_q=last(found.seqused_q), seqused_k=last(found.seqused_k), leftpad_k=last(found.leftpad_k),
        offset=last(found.offset), kv_indices=None if lists is None else lists[b], rng_state=extras["rng_state"],
    )  # fmt: skip
    return Inputs(q[b], k[b], v[b], given)


def last_only(x: Tensor, number: int) -> Tensor:
    """Return cumulative lengths of empty sequences and the one with this number, which has all rows of x."""
    table = torch.zeros(number + 2, dtype=torch.int32)
    table[-1] = len(x)
    return table.to(x.device)


def _table(values: tuple[int, ...] | None, like: Tensor) -> Any:
    if values is None:
        return None
    return torch.tensor(values, dtype=torch.int32).to(like.device)


def _slice(piece: Piece) -> slice:
    return slice(piece.row, piece.row + piece.length)
