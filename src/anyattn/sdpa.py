"""The public functions whose arrays have heads first, as in torch.nn.functional: (..., nheads, seqlen, head_dim)."""

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
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument, on torch tensors.

    It also serves what torch computes with the whole score matrix in memory: dropout, a head_dim_v of its own, a float
    mask with a gradient, grouped-query attention with a mask, any number of leading dimensions, and jagged nested
    tensors of sequences, which are computed as packed ones.

    Args:
        query: (..., nheads, seqlen_q, head_dim), at least two dimensions; any strides.
        key: (..., nheads_kv, seqlen_k, head_dim). value: (..., nheads_kv, seqlen_k, head_dim_v). Leading dimensions
            broadcast, and so does a single head. All three may be nested tensors (batch, nheads, {seqlen}, head_dim)
            of layout torch.jagged, without a mask; the result is one too.
        attn_mask: broadcastable to (..., nheads, seqlen_q, seqlen_k). Boolean: True takes part. Floating point
            (float32 or query's dtype): added to the scaled scores, with a gradient; -inf hides a key. Or torch's
            CausalBias (causal_upper_left, causal_lower_right) of seqlen_q and seqlen_k.
        dropout_p: applied whenever > 0, as torch does: pass 0.0 outside training.
        is_causal: row i sees the keys 0 to i (aligned to the top left); excludes attn_mask.
        scale: default head_dim ** -0.5.
        enable_gqa: nheads may be a multiple of nheads_kv.

    Returns:
        (..., nheads, seqlen_q, head_dim_v) in query's dtype. A row that sees no key gives 0, where torch gives 0 or
        NaN depending on its path.

    Raises:
        ValueError, TypeError: an argument is wrong. NotImplementedError: nested tensors with a mask or another ragged
            dimension. UnsupportedProblem: no backend computes it.

    >>> import torch, anyattn
    >>> query, key = torch.ones(2, 4, 16, 8), torch.ones(2, 2, 20, 8)
    >>> anyattn.sdpa(query, key, key, torch.ones(16, 20, dtype=torch.bool), enable_gqa=True).shape
    torch.Size([2, 4, 16, 8])
    """
    if not hasattr(query, "__torch_function__"):
        raise TypeError(f"query must be a torch.Tensor; got {type(query).__name__}")
    from .frameworks.torch import sdpa as torch_sdpa

    dropout_p, is_causal = real("dropout_p", dropout_p), flag("is_causal", is_causal)
    scale, enable_gqa = None if scale is None else real("scale", scale), flag("enable_gqa", enable_gqa)
    compute: Any = torch_sdpa.sdpa  # which checks what it gets
    result: A = compute(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return result


def flash_attention(query: A, key: A, value: A, causal: bool = True, scale: float | None = None) -> A:
    """Attention in the layout (batch, nheads, seqlen, head_dim); query may have more heads than key and value.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 2, 4, 8), np.float32)
    >>> anyattn.flash_attention(x, x, x).shape
    (1, 2, 4, 8)
    """
    framework = framework_of(query, "query")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if getattr(array, "ndim", None) != 4:
            raise ValueError(f"{name} must be (batch, nheads, seqlen, head_dim); got {getattr(array, 'shape', array)}")
    swapped: list[Any] = [array.swapaxes(1, 2) for array in (query, key, value)]
    options = make_options(bounds(causal, None), scale=scale)
    out, _ = framework.attention(Inputs(*swapped), options, None, False, None)
    result: A = out.swapaxes(1, 2)
    return result
