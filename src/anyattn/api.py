"""The public functions. Arrays are NumPy arrays or torch tensors: what comes in decides what comes out.

Here mask arguments become interval bounds and arguments their canonical order; the framework's module does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from .arguments import A, Array, Table, Window, bounds, check_parts, explicit, make_options, paged_lengths
from .definition.inputs import NO_EXTRAS, Appended, Extras, Gradients, Inputs, Saved, replace_extras
from .definition.options import Rotation
from .frameworks import framework_of
from .scalars import flag, integer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import CacheArguments, DenseArguments, ExplicitArguments, VarlenArguments


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
    dropout_p: float = 0.0,
    seed: int | None = None,
    rng_state: Array | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> A | tuple[A, A]:
    r"""Exact attention in O(N) memory.

        t_ij  = scale <q_i, k_j>                     then softcap tanh(t_ij / softcap) if softcap > 0
        s_ij  = t_ij + bias_ij - alibi_slope |p - c|  p = i + offset (row), c = j - leftpad (key)
        lse_i = log sum_j exp(s_ij) (+ exp(sink))     over the keys j that row i sees
        out_i = sum_j exp(s_ij - lse_i) v_j

    Query head h reads KV head h // (nheads / nheads_kv), so grouped-query and multi-query attention need no expansion.
    The causal mask is aligned to the bottom right: with 2 rows and 5 keys, and 5 rows and 2 keys (1: seen),

        1 1 1 1 0        0 0
        1 1 1 1 1        0 0
                         0 0
                         1 0
                         1 1

    Args:
        q: (batch, seqlen_q, nheads, head_dim), float32, float16, bfloat16 or float64; any strides (a copy is made only
            if the last dimension is not contiguous).
        k: (batch, seqlen_k, nheads_kv, head_dim), of q's dtype; nheads is a multiple of nheads_kv.
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        causal: rows see no key after their position.
        window: (left, right), inclusive: how many keys before and after its position a row sees; None: unbounded.
        chunk: rows see keys of their own chunk of this many positions only; 0: off.
        alignment: "bottom-right": the last row is at the last key; "top-left": row 0 is at key 0 (as torch SDPA).
        offset: position of row 0, an int or one int per sequence, instead of an alignment.
        scale: any finite number; default head_dim ** -0.5.
        softcap: 0: off.
        bias: added to the scaled scores; broadcastable to (batch, nheads, seqlen_q, seqlen_k), q's dtype or float32.
            -inf hides a key. Has a gradient.
        mask: boolean, broadcastable likewise; False hides a key.
        alibi_slopes: (nheads,) or (batch, nheads).
        sink: (nheads,), one more logit in each denominator. Has a gradient.
        seqused_q: (batch,), rows in use; the others give 0.
        seqused_k: (batch,), keys in use.
        leftpad_k: (batch,), first key slot in use.
        kv_indices: integers (batch, seqlen_q, n), or (batch, nheads_kv, seqlen_q, n): each query attends only to the
            key slots in its list that the other masks leave visible. -1 is no key; a slot that is listed twice counts
            once. On the CPU backend work grows with n, not with seqlen_k.
        dropout_p: probability in [0, 1), in steps of 2^-16. The same entries are dropped on every backend.
        seed: int; or rng_state, an int64 array (seed, offset). Default: drawn from the framework's random generator.
        deterministic: run-to-run identity or an error (the CPU engines always are).
        batch_invariant: a sequence's result does not depend on the rest of the batch.
        return_lse: also return lse; gradients then flow through it.
        backend: "cpu", "triton", "vulkan" or "numpy"; one that is named never falls back. Default: automatic.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v) in q's dtype, contiguous; with return_lse also the natural logarithm
        lse (batch, nheads, seqlen_q), float32 (float64 for float64). A row that sees no key: out 0, lse -inf (with a
        sink: lse = sink). NaN in memory that no row may see changes nothing.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing was written. UnsupportedProblem: no backend computes it.

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
        deterministic=deterministic, batch_invariant=batch_invariant,
    )  # fmt: skip
    extras = NO_EXTRAS
    if not (
        bias is mask is alibi_slopes is sink is seqused_q is seqused_k is leftpad_k is offset is None
        and kv_indices is rng_state is None
    ):
        extras = Extras(
            bias=bias, mask=mask, alibi_slopes=alibi_slopes, sink=sink, seqused_q=seqused_q, seqused_k=seqused_k,
            leftpad_k=leftpad_k, offset=offset, kv_indices=kv_indices, rng_state=rng_state,
        )  # fmt: skip
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
    dropout_p: float = 0.0,
    seed: int | None = None,
    rng_state: Array | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> A | tuple[A, A]:
    """Attention over sequences of different lengths, packed one behind the other: no padding is computed or stored.

    Args:
        q: (total_q, nheads, head_dim). k, v: (total_k, nheads_kv, ...); with block_table the pages
            (num_pages, page_size, nheads_kv, ...), of any page size.
        cu_seqlens_q: (batch + 1,), where each sequence begins: rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_k: the same for k and v; with block_table it only gives the lengths (or None, with seqused_k).
        max_seqlen_q: an upper bound of the lengths, if known (it spares GPUs a synchronisation); a smaller one raises.
        block_table: (batch, max_pages): key j of sequence b is row j % page_size of block_table[b, j // page_size].
        kv_indices: (total_q, n), or (nheads_kv, total_q, n): key slots of each query's own sequence.

    The other arguments are those of `attention`.

    Returns:
        out (total_q, nheads, head_dim_v); with return_lse also lse (nheads, total_q). Rows of no sequence: 0 and -inf.

    >>> import numpy as np, anyattn
    >>> x = np.ones((7, 2, 8), np.float32)
    >>> anyattn.attention_varlen(x, x, x, [0, 3, 7], [0, 3, 7], causal=True).shape
    (7, 2, 8)
    """
    if cu_seqlens_k is None and (seqused_k is None or block_table is None):
        raise ValueError("cu_seqlens_k is None: accepted only with block_table and seqused_k")
    cu_seqlens_k, seqused_k = paged_lengths(block_table, cu_seqlens_k, seqused_k)
    options = make_options(
        bounds(causal, window), scale=scale, softcap=softcap, chunk=chunk, alignment=alignment, dropout_p=dropout_p,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, deterministic=deterministic,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    extras = Extras(
        alibi_slopes=alibi_slopes, sink=sink, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k, offset=offset, block_table=block_table,
        kv_indices=kv_indices, rng_state=rng_state,
    )  # fmt: skip
    out, lse = framework_of(q).attention(Inputs(q, k, v, extras), options, seed, return_lse, backend)
    return (out, lse) if return_lse else out


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
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> A | tuple[A, A]:
    """Attention to a KV cache after appending to it in place: a step of generation, or a chunk of prefill.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k_cache: (entries, slots, nheads_kv, head_dim); with block_table (num_pages, page_size, nheads_kv, head_dim).
        v_cache: the same with head_dim_v.
        k, v: (batch, seqlen_new, nheads_kv, ...): written at slots cache_seqlens + t, k rotated, v bit-equal.
        cache_seqlens: keys already in the cache, an int or one per sequence; None (without k): all slots.
        cache_batch_idx: (batch,), which entry of the cache each sequence uses.
        block_table: (batch, max_pages), for pages of any size.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2). k row t is rotated at cache_seqlens + t; q row i at
            cache_seqlens + i if causal or windowed, else at cache_seqlens.
        rotary_interleaved: pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        num_splits: a hint for GPUs, without effect on results.

    The other arguments are those of `attention`. No gradients flow through the cache.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v); with return_lse also lse (batch, nheads, seqlen_q).

    Raises:
        ValueError: the cache is full, a page is unknown, rotary does not fit; nothing was written.

    >>> import numpy as np, anyattn
    >>> cache_k, cache_v = np.zeros((1, 16, 2, 8), np.float32), np.zeros((1, 16, 2, 8), np.float32)
    >>> x = np.ones((1, 1, 2, 8), np.float32)
    >>> anyattn.attention_with_kvcache(x, cache_k, cache_v, k=x, v=x, cache_seqlens=3).shape, bool(cache_k[0, 3].all())
    ((1, 1, 2, 8), True)
    """
    if integer("num_splits", num_splits) < 0:
        raise ValueError(f"num_splits must be >= 0 (0: automatic); got {num_splits}")
    interval = bounds(causal, window)
    options = make_options(
        interval, scale=scale, softcap=softcap, chunk=chunk, alignment=alignment, batch_invariant=batch_invariant
    )
    extras = Extras(
        bias=bias, mask=mask, alibi_slopes=alibi_slopes, sink=sink, seqused_q=seqused_q, leftpad_k=leftpad_k,
        offset=offset, block_table=block_table, cache_batch_idx=cache_batch_idx, kv_indices=kv_indices,
    )  # fmt: skip
    framework = framework_of(q)

    def check(seqused_k: Table | None) -> None:
        framework.check(Inputs(q, k_cache, v_cache, replace_extras(extras, seqused_k=seqused_k)), options, backend)

    rotated, seqused_k = framework.append(
        Appended(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, block_table),
        Rotation(interleaved=flag("rotary_interleaved", rotary_interleaved), by_row=interval != (None, None)),
        backend,
        check=check,
    )
    inputs = Inputs(rotated, k_cache, v_cache, replace_extras(extras, seqused_k=seqused_k))
    out, lse = framework.attention(inputs, options, None, return_lse, backend)
    return (out, lse) if return_lse else out


def attention_forward(q: A, k: A, v: A, **arguments: Unpack[ExplicitArguments]) -> tuple[A, A]:
    """(out, lse) without autograd, from the same arguments as `attention` or, with cu_seqlens_q, `attention_varlen`.

    dropout_p > 0 needs seed or rng_state, so that `attention_backward` can be given the same.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> out, lse = anyattn.attention_forward(x, x, x, causal=True)
    >>> grads = anyattn.attention_backward(np.ones_like(out), x, x, x, out, lse, causal=True)
    >>> grads.dv.shape, grads.dbias is None
    ((1, 4, 2, 8), True)
    """
    inputs, options, seed, backend = explicit(q, k, v, arguments, "attention_forward")
    return framework_of(q).forward(inputs, options, seed, backend)


def attention_backward(
    dout: A, q: A, k: A, v: A, out: A, lse: A, *, dlse: A | None = None, **arguments: Unpack[ExplicitArguments]
) -> Gradients:
    """Gradients of sum(out * dout) (+ sum(lse * dlse)), from what `attention_forward` was given and returned.

        dP_ij = D_ij <do_i, v_j>      delta_i = <do_i, o_i> - dlse_i      ds_ij = P_ij (dP_ij - delta_i)
        dq_i = scale sum_j dt_ij k_j  dk_j = scale sum_i dt_ij q_i        dv_j = sum_i P_ij D_ij do_i

    with dt = ds (1 - (t / softcap)^2) under a softcap, sums over the rows and heads that read a key, and D the dropout
    factors. dbias = ds summed over the broadcast axes; dsink_h = - sum_i exp(sink_h - lse_i) delta_i. Keys that no row
    sees get 0.
    """
    inputs, options, seed, backend = explicit(q, k, v, arguments, "attention_backward")
    return framework_of(q).backward(Saved(out, lse, dout, dlse), inputs, options, seed, backend)


def merge(out_a: A, lse_a: A, out_b: A, lse_b: A) -> tuple[A, A]:
    """The exact attention over the union of two disjoint sets of keys, from the results over each.

        lse = log(exp(lse_a) + exp(lse_b))      out = out_a + (out_b - out_a) exp(lse_b - lse)

    Rows that see no key in either give out 0 and lse -inf. out (..., nheads, head_dim_v), lse (nheads, ...).

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> halves = [anyattn.attention(x, x[:, s], x[:, s], return_lse=True) for s in (slice(0, 2), slice(2, 4))]
    >>> bool(np.allclose(anyattn.merge(*halves[0], *halves[1])[0], anyattn.attention(x, x, x)))
    True
    """
    check_parts(out_a, lse_a, out_b, lse_b)
    return framework_of(out_a, "out_a").merge(out_a, lse_a, out_b, lse_b)
