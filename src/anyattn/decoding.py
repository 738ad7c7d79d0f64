"""Public function for decoding: attention with a KV cache, to which new keys and values are appended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from .arguments import A, Array, ScoreFunction, Table, Window, bounds, make_options
from .definition.inputs import Appended, Extras, Inputs, replace_extras
from .definition.options import Options, Rotation
from .frameworks import framework_of
from .frameworks.score_arguments import CACHE
from .scalars import flag, integer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import CacheArguments


@overload
def attention_with_kvcache(
    q: A, k_cache: A, v_cache: A, *, return_lse: Literal[False] = False, **arguments: Unpack[CacheArguments]
) -> A: ...
@overload
def attention_with_kvcache(
    q: A, k_cache: A, v_cache: A, *, return_lse: Literal[True], **arguments: Unpack[CacheArguments]
) -> tuple[A, A]: ...
@overload
def attention_with_kvcache(
    q: A, k_cache: A, v_cache: A, *, return_lse: bool, **arguments: Unpack[CacheArguments]
) -> A | tuple[A, A]: ...
def attention_with_kvcache(
    q: A,
    k_cache: A,
    v_cache: A,
    *,
    k: Array | None = None,
    v: Array | None = None,
    cache_seqlens: int | Table | None = None,
    cache_batch_idx: Table | None = None,
    block_table: Array | Sequence[Sequence[int]] | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
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
    leftpad_k: Table | None = None,
    kv_indices: Array | None = None,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: ScoreFunction | None = None,
    batch_invariant: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> A | tuple[A, A]:
    """Append keys and values to a KV cache in place, then attend to the cache.

    One call is a decoding step or a chunk of prefill. No gradients flow through the cache.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k_cache: (entries, slots, nheads_kv, head_dim); with block_table (num_pages, page_size, nheads_kv, head_dim). Of
            q's dtype, or int8, float8_e4m3fn or float8_e5m2 with scales.
        v_cache: like k_cache, with head_dim_v.
        k: (batch, seqlen_new, nheads_kv, head_dim), new keys; key t is rotated and written to slot cache_seqlens + t.
        v: (batch, seqlen_new, nheads_kv, head_dim_v), new values, written unchanged.
        cache_seqlens: number of keys already in the cache, an int or (batch,). None (only without k): all slots.
        cache_batch_idx: (batch,), cache entry of each sequence.
        block_table: (batch, max_pages), for pages of any size.
        rotary_cos: (positions, rotary_dim / 2). New key t is rotated at position cache_seqlens + t. Query i is rotated
            at cache_seqlens + i if causal or windowed, else at cache_seqlens.
        rotary_sin: (positions, rotary_dim / 2).
        rotary_interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        num_splits: a hint for GPUs; it does not affect results.
        causal: each query attends only to keys at or before its own position.
        window: (left, right), inclusive, None: unbounded.
        chunk: number of positions in a chunk that queries attend within; 0: off.
        alignment: "bottom-right" or "top-left".
        offset: position of query 0, an int or (batch,).
        scale: default head_dim ** -0.5.
        softcap: 0: off.
        bias: broadcastable to (batch, nheads, seqlen_q, slots).
        mask: boolean, broadcastable like bias. False masks a key.
        alibi_slopes: (nheads,) or (batch, nheads).
        sink: (nheads,).
        seqused_q: (batch,), number of queries in use.
        leftpad_k: (batch,), first key slot in use.
        kv_indices: (batch, seqlen_q, n) or (batch, nheads_kv, seqlen_q, n), key slots of each query.
        k_scale: factor of quantised keys, float32: a number, (nheads_kv,), (batch, nheads_kv), or one per slot, in
            k_cache's shape without head_dim. New keys and values are quantised, which needs one per slot, and their
            scales are written: max |x| / 127 for int8, max |x| / the largest number of a float8.
        v_scale: factor of quantised values, like k_scale.
        score_mod: a function (score, b, h, q_idx, kv_idx) -> score. kv_idx is the slot; q_idx counts the queries.
        mask_mod: a function (b, h, q_idx, kv_idx) -> bool.
        batch_invariant: guarantee that the result of a sequence does not depend on the rest of the batch.
        precision: "exact" or "fast".
        return_lse: also return lse.
        backend: "cpu", "triton", "vulkan" or "numpy".

    `attention` describes the shared arguments and the errors in detail.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v); with return_lse also lse (batch, nheads, seqlen_q).

    Raises:
        ValueError: the cache is full, a page is unknown or the rotary tables do not fit. Nothing was written.

    >>> import numpy as np, anyattn
    >>> cache_k, cache_v = np.zeros((1, 16, 2, 8), np.float32), np.zeros((1, 16, 2, 8), np.float32)
    >>> x = np.ones((1, 1, 2, 8), np.float32)
    >>> anyattn.attention_with_kvcache(x, cache_k, cache_v, k=x, v=x, cache_seqlens=3).shape, bool(cache_k[0, 3].all())
    ((1, 1, 2, 8), True)
    """
    if integer("num_splits", num_splits) < 0:
        raise ValueError(f"num_splits must be >= 0 (0: automatic), got {num_splits}.")
    interval = bounds(causal, window)
    options = make_options(interval, scale=scale, softcap=softcap, chunk=chunk, alignment=alignment,
                           batch_invariant=batch_invariant, precision=precision)  # fmt: skip
    extras = Extras(
        bias=bias, mask=mask, alibi_slopes=alibi_slopes, sink=sink, seqused_q=seqused_q, leftpad_k=leftpad_k,
        offset=offset, block_table=block_table, cache_batch_idx=cache_batch_idx, kv_indices=kv_indices,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    framework = framework_of(q)
    if score_mod is not None or mask_mod is not None:
        options, extras = _with_functions(Inputs(q, k_cache, v_cache, extras), options, score_mod, mask_mod)
    arrays = Appended(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, block_table,
                      k_scale, v_scale)  # fmt: skip
    rotation = Rotation(interleaved=flag("rotary_interleaved", rotary_interleaved), by_row=interval != (None, None))
    rotated, seqused_k = framework.append(
        arrays, rotation, backend,
        check=lambda x: framework.check(_inputs(q, k_cache, v_cache, extras, x), options, backend),
    )  # fmt: skip
    inputs = _inputs(rotated, k_cache, v_cache, extras, seqused_k)
    out, lse = framework.attention(inputs, options, None, return_lse, backend)
    return (out, lse) if return_lse else out


def _with_functions(inputs: Inputs, options: Options, score_mod: Any, mask_mod: Any) -> tuple[Options, Extras]:
    """Return the options and extras of a call with functions. The append reads q and the cache as they are."""
    found = framework_of(inputs.q).with_functions(inputs, options, score_mod, mask_mod, CACHE)
    return found.options, found.inputs.extras


def _inputs(q: Array, k: Array, v: Array, extras: Extras, seqused_k: Table | None) -> Inputs:
    return Inputs(q, k, v, replace_extras(extras, seqused_k=seqused_k))
