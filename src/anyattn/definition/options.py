"""Scalars of a call."""

from __future__ import annotations

from typing import NamedTuple

ALIGNMENTS = ("bottom-right", "top-left")
PRECISIONS = ("exact", "fast")


class Options(NamedTuple):
    """Scalars of attention, in the order of the operators' schemas.

    `left` and `right` are inclusive, and None if unbounded. A max_seqlen of 0 means unknown. query_start and key_start
    are added to the indices that dropout counts by. partial: out and gradients are in the compute dtype. score: text
    of the graph of score_mod and mask_mod, "" without them. precision: one of PRECISIONS, or "" for the setting's.
    """

    scale: float | None = None
    softcap: float = 0.0
    left: int | None = None
    right: int | None = None
    chunk: int = 0
    alignment: str = "bottom-right"
    dropout_p: float = 0.0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    deterministic: bool = False
    batch_invariant: bool = False
    query_start: int = 0
    key_start: int = 0
    partial: bool = False
    score: str = ""
    precision: str = ""


class Rotation(NamedTuple):
    """Scalars of an append.

    interleaved: rotary pairs are (0, 1), (2, 3), ...; else (0, d/2), (1, d/2 + 1), ...
    by_row: query i is rotated at cache_seqlens + i (causal or windowed); else every query at cache_seqlens.
    """

    interleaved: bool = True
    by_row: bool = False
