"""Attention weights of selected queries, computed after attention from its logsumexp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arguments import A, Array, Table, Window, bounds, make_options
from .definition.inputs import Extras, Inputs
from .frameworks import framework_of

if TYPE_CHECKING:
    Queries = slice | Sequence[int] | Array


def attention_weights(
    q: A,
    k: A,
    lse: A,
    *,
    queries: Queries | None = None,
    causal: bool = False,
    window: Window = None,
    chunk: int = 0,
    alignment: str = "bottom-right",
    offset: int | Table | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Array | None = None,
    mask: Array | None = None,
    kv_indices: Array | None = None,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    seqused_q: Table | None = None,
    seqused_k: Table | None = None,
    leftpad_k: Table | None = None,
) -> A:
    r"""Compute the attention weights of selected queries from the lse that `attention` returned.

        P_ij = exp(s_ij - lse_i) where query i attends to key j, else 0

    with the scores s of `attention`. Dropout is not applied. A query without keys gives zeros, and with a
    sink the weights of a query sum to less than 1. Score functions, packed sequences, pages and quantised keys are not
    supported.

    In addition to the result, the call needs memory for one tile of scores (16 MiB and a few copies of it). Where torch
    records gradients, traces or transforms the call, all scores of the selected queries are stored, in float32. The
    same holds for JAX arrays.

    Args:
        q: (batch, seqlen_q, nheads, head_dim), a NumPy array, a JAX array or a torch tensor on any device.
        k: (batch, seqlen_k, nheads_kv, head_dim).
        lse: (batch, nheads, seqlen_q), as `attention(..., return_lse=True)` returned it for these arguments. With the
            lse of `merge` the weights are those among the keys of all parts.
        queries: None (all), a slice with a positive step, or a 1-D array, tensor or list of integers. Negative integers
            count from the end.
        causal: this and all arguments below must be those of the `attention` call.
        window: (left, right).
        chunk: length of chunks of positions; 0: off.
        alignment: "bottom-right" or "top-left".
        offset: position of query 0.
        scale: default head_dim ** -0.5.
        softcap: 0: off.
        bias: broadcastable to (batch, nheads, seqlen_q, seqlen_k).
        mask: boolean, broadcastable like bias.
        kv_indices: (batch, seqlen_q, n) or (batch, nheads_kv, seqlen_q, n), the key slots of each query; -1: no key.
        alibi_slopes: (nheads,) or (batch, nheads).
        sink: (nheads,). lse already contains it, so sink is only checked.
        seqused_q: (batch,), queries in use; unused queries give zeros.
        seqused_k: (batch,), keys in use.
        leftpad_k: (batch,), first key slot in use.

    Returns:
        (batch, nheads, queries, seqlen_k) in q's dtype, rounded from float32 (float64 for float64), contiguous. torch
        and JAX: differentiable in q, k, bias and lse. Gradients of a softmax flow through lse too, so torch
        refuses an lse without a gradient where q, k, bias or sink require one.

    Raises:
        ValueError, TypeError: an argument is wrong. Packed sequences and pages are refused: q and k have 4 dimensions.

    >>> import numpy as np, anyattn
    >>> q, k, v = (np.random.default_rng(0).standard_normal((1, 16, 2, 8), np.float32) for _ in range(3))
    >>> out, lse = anyattn.attention(q, k, v, causal=True, return_lse=True)
    >>> last = anyattn.attention_weights(q, k, lse, queries=[-1], causal=True)
    >>> last.shape, bool(np.allclose(np.einsum("bhij,bjhd->bihd", last, v), out[:, -1:], atol=1e-6))
    ((1, 2, 1, 16), True)
    """
    options = make_options(bounds(causal, window), scale=scale, softcap=softcap, chunk=chunk, alignment=alignment)
    extras = Extras(
        bias=bias, mask=mask, kv_indices=kv_indices, alibi_slopes=alibi_slopes, sink=sink, seqused_q=seqused_q,
        seqused_k=seqused_k, leftpad_k=leftpad_k, offset=offset,
    )  # fmt: skip
    if lse is None:
        raise TypeError("lse must be what attention(..., return_lse=True) returned, got None.")
    weights: A = framework_of(q).scores(Inputs(q, k, k, extras), options, queries, "weights", lse)
    return weights
