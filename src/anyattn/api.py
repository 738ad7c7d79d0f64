"""Public attention functions for NumPy arrays, torch tensors and JAX arrays; results have the kind of the inputs.

This module turns mask arguments into interval bounds and collects the arguments. The framework's module does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from .arguments import A, Array, ScoreFunction, Table, Window, bounds, make_options, paged_lengths
from .definition.inputs import NO_EXTRAS, Extras, Inputs
from .frameworks import framework_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import DenseArguments, VarlenArguments


@overload
def attention(q: A, k: A, v: A, *, return_lse: Literal[False] = False, **arguments: Unpack[DenseArguments]) -> A: ...
@overload
def attention(q: A, k: A, v: A, *, return_lse: Literal[True], **arguments: Unpack[DenseArguments]) -> tuple[A, A]: ...
@overload
def attention(q: A, k: A, v: A, *, return_lse: bool, **arguments: Unpack[DenseArguments]) -> A | tuple[A, A]: ...
def attention(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window: Window = None,
    chunk: int = 0,
    alignment: str = "bottom-right",
    offset: int | Table | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Array | None = None,
    mask: Array | None = None,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    seqused_q: Table | None = None,
    seqused_k: Table | None = None,
    leftpad_k: Table | None = None,
    kv_indices: Array | None = None,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: ScoreFunction | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    rng_state: Array | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> A | tuple[A, A]:
    r"""Compute exact attention in O(N) memory.

        t_ij  = scale <q_i, k_j>                     then softcap tanh(t_ij / softcap) if softcap > 0
        t_ij  = score_mod(t_ij, b, h, i, j)          if score_mod is given
        s_ij  = t_ij + bias_ij - alibi_slope |p - c|  p = i + offset (query), c = j - leftpad (key)
        lse_i = log sum_j exp(s_ij) (+ exp(sink))     over the keys j that are visible to query i
        out_i = sum_j exp(s_ij - lse_i) v_j

    Query head h uses KV head h // (nheads / nheads_kv), so grouped-query and multi-query attention need no expansion.
    The causal mask is aligned to the bottom right. With 2 queries and 5 keys, and with 5 queries and 2 keys (1:
    visible):

        1 1 1 1 0        0 0
        1 1 1 1 1        0 0
                         0 0
                         1 0
                         1 1

    Args:
        q: (batch, seqlen_q, nheads, head_dim), float32, float16, bfloat16 or float64. Any strides are accepted, and a
            copy is made only if the last dimension is not contiguous.
        k: (batch, seqlen_k, nheads_kv, head_dim), of q's dtype, or int8, float8_e4m3fn or float8_e5m2 with scales;
            nheads is a multiple of nheads_kv.
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        causal: each query attends only to keys at or before its own position.
        window: (left, right), inclusive: number of keys before and after its position that a query attends to. None in
            either place means unbounded.
        chunk: each query attends only to keys in its own chunk of this many positions; 0: off.
        alignment: "bottom-right": the last query is aligned with the last key; "top-left": query 0 is aligned with
            key 0 (as in torch SDPA).
        offset: position of query 0, an int or one int per sequence. It replaces `alignment`.
        scale: any finite number; default head_dim ** -0.5.
        softcap: the bound of a tanh applied to the scaled scores; 0: off.
        bias: added to the scaled scores; broadcastable to (batch, nheads, seqlen_q, seqlen_k), in q's dtype or float32.
            -inf masks a key. bias has a gradient.
        mask: boolean, broadcastable like bias. False masks a key.
        alibi_slopes: (nheads,) or (batch, nheads). slope * |p - c| is subtracted from scores. They have no gradient.
        sink: (nheads,), one additional logit in each softmax denominator. sink has a gradient.
        seqused_q: (batch,), number of queries in use; unused queries give 0.
        seqused_k: (batch,), number of keys in use.
        leftpad_k: (batch,), first key slot in use.
        kv_indices: integers (batch, seqlen_q, n), or (batch, nheads_kv, seqlen_q, n): each query attends only to the
            key slots in its list that the other masks leave visible. -1 means no key. A slot that is listed twice
            counts once. On the CPU backend, the work grows with n instead of seqlen_k.
        k_scale: factor of quantised keys, float32: the keys are k_scale * k. A number, (nheads_kv,), (batch,
            nheads_kv), or one per slot: (batch, seqlen_k, nheads_kv). Only q, bias and sink then have gradients.
        v_scale: factor of quantised values, like k_scale.
        score_mod: a function (score, b, h, q_idx, kv_idx) -> score, as in FlexAttention. `score` is the scaled score.
            The indices count batch entries, query heads, and the queries and keys of the sequence. The function is
            called once with symbols. It computes with operators, functions of torch or NumPy, and reads of captured
            arrays; see docs/score-functions.md. Captured floating-point torch tensors have gradients.
        mask_mod: a function (b, h, q_idx, kv_idx) -> bool. False masks a key. Tiles that it masks are skipped.
        dropout_p: probability in [0, 1), in steps of 2^-16. Every backend drops the same entries.
        seed: an int that determines the dropout mask. Default: sampled from the framework's random generator.
        rng_state: int64 array (seed, offset), an alternative to `seed`.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        batch_invariant: guarantee that the result of a sequence does not depend on the rest of the batch.
        precision: "exact", or "fast": float32 products may use 16 of the 24 bits of each number where this is faster,
            which is on AMX tiles. Elsewhere, and for other dtypes, both give the same bits. Default: the setting
            ANYATTN_PRECISION, or else "exact".
        return_lse: also return lse. Gradients then flow through lse too.
        backend: "cpu", "triton", "vulkan" or "numpy". A named backend never falls back to another one. Default: the
            first backend that supports the call.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v) in q's dtype, contiguous. With return_lse also the natural logarithm
        lse (batch, nheads, seqlen_q), float32 (float64 for float64). A query without visible keys gives out 0 and lse
        -inf (lse = sink with a sink). NaN in memory that no query attends to has no effect.

    Raises:
        ValueError: an argument has a wrong value or shape. Nothing was written.
        TypeError: an argument has a wrong type or dtype. Nothing was written.
        UnsupportedProblem: no backend supports the call.

    Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).

    >>> import numpy as np, anyattn
    >>> q, k, v = (np.random.default_rng(0).standard_normal((1, 16, 2, 8), np.float32) for _ in range(3))
    >>> anyattn.attention(q, k, v, causal=True).shape
    (1, 16, 2, 8)
    >>> lists = np.tile([0, 2, -1], (1, 16, 1))  # every query attends to keys 0 and 2
    >>> bool(np.allclose(anyattn.attention(q, k, v, kv_indices=lists), anyattn.attention(q, k[:, :3:2], v[:, :3:2])))
    True
    """
    options = make_options(
        bounds(causal, window), scale=scale, softcap=softcap, chunk=chunk, alignment=alignment, dropout_p=dropout_p,
        deterministic=deterministic, batch_invariant=batch_invariant, precision=precision,
    )  # fmt: skip
    extras = NO_EXTRAS
    if not (
        bias is mask is alibi_slopes is sink is seqused_q is seqused_k is leftpad_k is offset is None
        and kv_indices is rng_state is k_scale is v_scale is None
    ):
        extras = Extras(
            bias=bias, mask=mask, alibi_slopes=alibi_slopes, sink=sink, seqused_q=seqused_q, seqused_k=seqused_k,
            leftpad_k=leftpad_k, offset=offset, kv_indices=kv_indices, rng_state=rng_state, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
    if score_mod is not None or mask_mod is not None:
        given, functions = Inputs(q, k, v, extras), (score_mod, mask_mod)
        out, lse = framework_of(q).attention_with_functions(given, options, functions, seed, return_lse, backend)
        return (out, lse) if return_lse else out
    out, lse = framework_of(q).attention(Inputs(q, k, v, extras), options, seed, return_lse, backend)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: A,
    k: A,
    v: A,
    cu_seqlens_q: Table,
    cu_seqlens_k: Table | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **arguments: Unpack[VarlenArguments],
) -> A: ...
@overload
def attention_varlen(
    q: A,
    k: A,
    v: A,
    cu_seqlens_q: Table,
    cu_seqlens_k: Table | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    **arguments: Unpack[VarlenArguments],
) -> tuple[A, A]: ...
@overload
def attention_varlen(
    q: A,
    k: A,
    v: A,
    cu_seqlens_q: Table,
    cu_seqlens_k: Table | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool,
    **arguments: Unpack[VarlenArguments],
) -> A | tuple[A, A]: ...
def attention_varlen(
    q: A,
    k: A,
    v: A,
    cu_seqlens_q: Table,
    cu_seqlens_k: Table | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    block_table: Array | Sequence[Sequence[int]] | None = None,
    causal: bool = False,
    window: Window = None,
    chunk: int = 0,
    alignment: str = "bottom-right",
    offset: int | Table | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    seqused_q: Table | None = None,
    seqused_k: Table | None = None,
    leftpad_k: Table | None = None,
    kv_indices: Array | None = None,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: ScoreFunction | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    rng_state: Array | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> A | tuple[A, A]:
    """Compute attention over sequences of different lengths, concatenated without padding.

    Args:
        q: (total_q, nheads, head_dim).
        k: (total_k, nheads_kv, head_dim); with block_table, pages (num_pages, page_size, nheads_kv, head_dim) of any
            page size.
        v: like k, with head_dim_v.
        cu_seqlens_q: (batch + 1,), cumulative lengths: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q.
        cu_seqlens_k: (batch + 1,), cumulative lengths of k and v. With block_table they only give the lengths, and may
            be None if seqused_k is given.
        max_seqlen_q: an upper bound on the query lengths, if known. It saves a synchronisation on GPUs. A bound that is
            too small raises.
        max_seqlen_k: an upper bound on the key lengths.
        block_table: (batch, max_pages): key j of sequence b is row j % page_size of page block_table[b, j //
            page_size].
        causal: each query attends only to keys at or before its own position.
        window: (left, right), inclusive, None: unbounded.
        chunk: number of positions in a chunk that queries attend within; 0: off.
        alignment: "bottom-right" or "top-left", within each sequence.
        offset: position of query 0 of each sequence, an int or (batch,).
        scale: default head_dim ** -0.5.
        softcap: 0: off.
        alibi_slopes: (nheads,) or (batch, nheads).
        sink: (nheads,).
        seqused_q: (batch,), number of queries in use.
        seqused_k: (batch,), number of keys in use.
        leftpad_k: (batch,), first key slot in use.
        kv_indices: (total_q, n), or (nheads_kv, total_q, n): key slots of each query's own sequence.
        k_scale: factor of quantised keys: a number, (nheads_kv,), (batch, nheads_kv), or one per slot: (1, total_k,
            nheads_kv), with block_table (num_pages, page_size, nheads_kv).
        v_scale: factor of quantised values, like k_scale.
        score_mod: a function (score, b, h, q_idx, kv_idx) -> score. b counts sequences; q_idx and kv_idx count within
            the sequence.
        mask_mod: a function (b, h, q_idx, kv_idx) -> bool.
        dropout_p: probability in [0, 1).
        seed: an int that determines the dropout mask.
        rng_state: int64 array (seed, offset), an alternative to `seed`.
        deterministic: guarantee identical results from run to run, or raise.
        batch_invariant: guarantee that the result of a sequence does not depend on the rest of the batch.
        precision: "exact" or "fast".
        return_lse: also return lse.
        backend: "cpu", "triton", "vulkan" or "numpy".

    `attention` describes the shared arguments and the errors in detail.

    Returns:
        out (total_q, nheads, head_dim_v); with return_lse also lse (nheads, total_q). Queries outside every sequence
        give out 0 and lse -inf.

    >>> import numpy as np, anyattn
    >>> x = np.ones((7, 2, 8), np.float32)
    >>> anyattn.attention_varlen(x, x, x, [0, 3, 7], [0, 3, 7], causal=True).shape
    (7, 2, 8)
    """
    if cu_seqlens_k is None and (seqused_k is None or block_table is None):
        raise ValueError(
            "cu_seqlens_k must be (batch + 1,), got None. Pass None only together with block_table and seqused_k."
        )
    cu_seqlens_k, seqused_k = paged_lengths(block_table, cu_seqlens_k, seqused_k)
    options = make_options(
        bounds(causal, window), scale=scale, softcap=softcap, chunk=chunk, alignment=alignment, dropout_p=dropout_p,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, deterministic=deterministic,
        batch_invariant=batch_invariant, precision=precision,
    )  # fmt: skip
    extras = Extras(
        alibi_slopes=alibi_slopes, sink=sink, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k, offset=offset, block_table=block_table,
        kv_indices=kv_indices, rng_state=rng_state, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    if score_mod is not None or mask_mod is not None:
        given, functions = Inputs(q, k, v, extras), (score_mod, mask_mod)
        out, lse = framework_of(q).attention_with_functions(given, options, functions, seed, return_lse, backend)
        return (out, lse) if return_lse else out
    out, lse = framework_of(q).attention(Inputs(q, k, v, extras), options, seed, return_lse, backend)
    return (out, lse) if return_lse else out
