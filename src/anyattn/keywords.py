"""Keywords of the public functions as types, for type checkers and for your own functions that pass keywords on.

def my_attention(q, k, v, **keywords: Unpack[anyattn.keywords.DenseArguments]): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from .arguments import Array, ScoreFunction, Table, Window


class SharedArguments(TypedDict, total=False):
    """Keywords of every attention function; `attention` describes them."""

    causal: bool
    window: Window
    chunk: int
    alignment: str
    offset: int | Table | None
    scale: float | None
    softcap: float
    alibi_slopes: Array | None
    sink: Array | None
    seqused_q: Table | None
    leftpad_k: Table | None
    kv_indices: Array | None
    k_scale: float | Array | None
    v_scale: float | Array | None
    score_mod: ScoreFunction | None
    mask_mod: ScoreFunction | None
    batch_invariant: bool
    precision: str | None
    backend: str | None


class DropoutArguments(TypedDict, total=False):
    """Keywords of the functions that can drop entries."""

    dropout_p: float
    seed: int | None
    rng_state: Array | None
    deterministic: bool


class DenseArguments(SharedArguments, DropoutArguments, total=False):
    """Keywords of `attention`."""

    bias: Array | None
    mask: Array | None
    seqused_k: Table | None


class VarlenArguments(SharedArguments, DropoutArguments, total=False):
    """Keywords of `attention_varlen`."""

    block_table: Array | Sequence[Sequence[int]] | None
    seqused_k: Table | None


class CacheArguments(SharedArguments, total=False):
    """Keywords of `attention_with_kvcache`."""

    k: Array | None
    v: Array | None
    cache_seqlens: int | Table | None
    cache_batch_idx: Table | None
    block_table: Array | Sequence[Sequence[int]] | None
    rotary_cos: Array | None
    rotary_sin: Array | None
    rotary_interleaved: bool
    num_splits: int
    bias: Array | None
    mask: Array | None


class ExplicitArguments(DenseArguments, total=False):
    """Keywords of `attention_forward`, `attention_backward`, `explain` and `warmup`, for every kind of call."""

    query_start: int
    key_start: int
    partial: bool
    cu_seqlens_q: Table | None
    cu_seqlens_k: Table | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    block_table: Array | Sequence[Sequence[int]] | None
    cache_batch_idx: Table | None
