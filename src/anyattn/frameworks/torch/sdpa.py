"""scaled_dot_product_attention in torch's own terms: leading dimensions, masks, causal alignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...definition.inputs import NO_EXTRAS, Extras, Inputs
from ...definition.options import Options
from . import functional


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """See heads_first.sdpa."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.ndim < 2:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (..., nheads, seqlen, head_dim); got {what}")
        if x.is_nested:
            raise NotImplementedError(f"{name} is a nested tensor: use anyattn.attention_varlen on its values")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None; got {type(attn_mask).__name__}")
    leading = None
    if not _plain(query, key, value, enable_gqa):
        query, key, value, attn_mask, leading = _four_dimensions(query, key, value, attn_mask, enable_gqa)
    bias, mask = _scores(query, attn_mask, is_causal)
    options = Options(scale=scale, right=0 if is_causal else None, alignment="top-left", dropout_p=dropout_p)
    extras = NO_EXTRAS if bias is mask is None else Extras(bias=bias, mask=mask)
    inputs = Inputs(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), extras)
    out, _ = functional.attention(inputs, options, None, False, None)
    out = out.transpose(1, 2)
    return out if leading is None else out.reshape(leading + out.shape[-2:])


def _plain(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether nothing has to be broadcast; one key head for all queries is grouped-query attention as it is."""
    if not (query.ndim == key.ndim == value.ndim == 4 and query.shape[0] == key.shape[0] == value.shape[0]):
        return False
    nheads_kv = key.shape[1]
    return value.shape[1] == nheads_kv and (enable_gqa or nheads_kv in (1, query.shape[1]))


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Views (batch, nheads, seqlen, head_dim) and the result's leading dimensions with heads.

    More than one leading dimension is copied where it is broadcast.
    """
    given = (query, key, value)
    rank = max(x.ndim for x in given)
    nheads = [x.shape[-3] if x.ndim > 2 else 1 for x in given]
    if not enable_gqa:
        most = max(nheads)
        if any(heads not in (1, most) for heads in nheads):
            raise ValueError(
                f"query, key and value have {nheads} heads: they must agree or be 1; for grouped queries pass "
                "enable_gqa=True"
            )
        nheads = [most] * 3 if nheads[1:] != [1, 1] else nheads
    try:
        batch = torch.broadcast_shapes(*[x.shape[:-3] for x in given])
    except RuntimeError as error:
        shapes = [tuple(x.shape) for x in given]
        raise ValueError(f"query, key and value must broadcast in their leading dimensions; got {shapes}") from error
    size = math.prod(batch)
    query, key, value = (
        x.expand(*batch, heads, *x.shape[-2:]).reshape(size, heads, *x.shape[-2:])
        for x, heads in zip(given, nheads, strict=True)
    )
    if attn_mask is not None and attn_mask.ndim > 3:
        shared = math.prod(attn_mask.shape[:-3]) == 1
        attn_mask = attn_mask if shared else attn_mask.expand(*batch, *attn_mask.shape[-3:])
        attn_mask = attn_mask.reshape(1 if shared else size, *attn_mask.shape[-3:])
    leading = (*batch, nheads[0]) if rank > 2 else ()
    return query, key, value, attn_mask, leading


def _scores(query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """(bias, mask)."""
    if attn_mask is None:
        return None, None
    if is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other: put the causal part into attn_mask")
    if attn_mask.dtype is torch.bool:
        return None, attn_mask
    if attn_mask.dtype not in (query.dtype, torch.float32):
        raise TypeError(f"attn_mask must be bool, float32 or of query's dtype {query.dtype}; got {attn_mask.dtype}")
    return attn_mask.to(torch.float64) if query.dtype is torch.float64 else attn_mask, None
