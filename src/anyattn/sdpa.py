"""Public functions with heads first, as in torch.nn.functional: (..., nheads, seqlen, head_dim)."""

from __future__ import annotations

from typing import Any

from .arguments import A, Array, bounds, make_options
from .definition.inputs import Inputs
from .frameworks import framework_of
from .scalars import flag, real


def sdpa(
    query: A,
    key: A,
    value: A,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> A:
    """Compute `torch.nn.functional.scaled_dot_product_attention`, argument for argument, on torch tensors.

    Memory stays O(N) where torch stores the whole score matrix: with dropout, a head_dim_v unlike head_dim, a float
    mask with a gradient, grouped-query attention with a mask, and any number of leading dimensions. Jagged nested
    tensors are computed as packed sequences.

    Args:
        query: (..., nheads, seqlen_q, head_dim), at least two dimensions; any strides.
        key: (..., nheads_kv, seqlen_k, head_dim). Leading dimensions and a single head broadcast. query, key and value
            may be nested tensors (batch, nheads, {seqlen}, head_dim) of layout torch.jagged, without a mask. The result
            is then nested too.
        value: (..., nheads_kv, seqlen_k, head_dim_v).
        attn_mask: broadcastable to (..., nheads, seqlen_q, seqlen_k). Boolean: False masks a key. Floating point
            (float32 or query's dtype): added to the scaled scores, with a gradient; -inf masks a key. torch's
            CausalBias (causal_upper_left, causal_lower_right) of seqlen_q and seqlen_k is accepted too.
        dropout_p: applied whenever > 0, as in torch. Pass 0.0 outside training.
        is_causal: query i attends to keys 0 to i (aligned to the top left). It cannot be combined with attn_mask.
        scale: default head_dim ** -0.5.
        enable_gqa: allow nheads to be a multiple of nheads_kv.

    Returns:
        (..., nheads, seqlen_q, head_dim_v) in query's dtype. A query without visible keys gives 0, where torch gives 0
        or NaN depending on its implementation.

    Raises:
        ValueError: an argument has a wrong value or shape.
        TypeError: an argument has a wrong type or dtype.
        NotImplementedError: nested tensors with a mask or another ragged dimension.
        UnsupportedProblem: no backend supports the call.

    >>> import torch, anyattn
    >>> query, key = torch.ones(2, 4, 16, 8), torch.ones(2, 2, 20, 8)
    >>> anyattn.sdpa(query, key, key, torch.ones(16, 20, dtype=torch.bool), enable_gqa=True).shape
    torch.Size([2, 4, 16, 8])
    """
    if not hasattr(query, "__torch_function__"):
        raise TypeError(f"query must be a torch.Tensor, got {type(query).__name__}.")
    from .frameworks.torch import sdpa as torch_sdpa

    dropout_p, is_causal = real("dropout_p", dropout_p), flag("is_causal", is_causal)
    scale, enable_gqa = None if scale is None else real("scale", scale), flag("enable_gqa", enable_gqa)
    compute: Any = torch_sdpa.sdpa  # checks its arguments
    result: A = compute(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return result


def flash_attention(query: A, key: A, value: A, causal: bool = True, scale: float | None = None) -> A:
    """Compute attention in the layout (batch, nheads, seqlen, head_dim), for arrays and tensors of every framework.

    Args:
        query: (batch, nheads, seqlen_q, head_dim); nheads is a multiple of nheads_kv.
        key: (batch, nheads_kv, seqlen_k, head_dim).
        value: (batch, nheads_kv, seqlen_k, head_dim_v).
        causal: each query attends only to keys at or before its own position, aligned to the bottom right.
        scale: default head_dim ** -0.5.

    Returns:
        (batch, nheads, seqlen_q, head_dim_v) in query's dtype, a view of a contiguous (batch, seqlen_q, nheads,
        head_dim_v) array. A query without visible keys gives 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        UnsupportedProblem: no backend supports the call.

    `anyattn.attention` has masks, windows, dropout and all other arguments, in the layout (batch, seqlen, nheads,
    head_dim).

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 2, 4, 8), np.float32)
    >>> anyattn.flash_attention(x, x, x).shape
    (1, 2, 4, 8)
    """
    framework = framework_of(query, "query")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if getattr(array, "ndim", None) != 4:
            raise ValueError(f"{name} must be (batch, nheads, seqlen, head_dim), got {getattr(array, 'shape', array)}.")
    swapped: list[Any] = [array.swapaxes(1, 2) for array in (query, key, value)]
    options = make_options(bounds(causal, None), scale=scale)
    out, _ = framework.attention(Inputs(*swapped), options, None, False, None)
    result: A = out.swapaxes(1, 2)
    return result
