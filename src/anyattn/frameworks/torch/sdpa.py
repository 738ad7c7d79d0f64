"""Implementation of scaled_dot_product_attention: leading dimensions, masks, causal alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...definition.inputs import NO_EXTRAS, Extras, Inputs
from ...definition.options import Options
from . import functional, jagged, kinds, tracing

Shape = tuple[int, ...]


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
    """Compute scaled_dot_product_attention; see anyattn.sdpa."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.ndim < 2:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (..., nheads, seqlen, head_dim), got {what}.")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}.")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask cannot be combined with is_causal=True. Include the causal mask in attn_mask.")
    if query.is_nested or key.is_nested or value.is_nested:
        return jagged.sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    query, key, value = kinds.dense("query", query), kinds.dense("key", key), kinds.dense("value", value)
    alignment = "top-left"
    if attn_mask is not None and kinds.causal_bias(attn_mask) is not None:
        alignment, attn_mask, is_causal = _alignment(kinds.causal_bias(attn_mask), query, key), None, True
    shapes: tuple[Shape, Shape, Shape] = (query.shape, key.shape, value.shape)
    if tracing.active():
        shapes = (tracing.sizes(query), tracing.sizes(key), tracing.sizes(value))
    leading = None
    if not _fits(shapes, enable_gqa):
        query, key, value, attn_mask, leading = _four_dimensions(query, key, value, attn_mask, shapes, enable_gqa)
    elif not enable_gqa and tracing.active():  # the trace would compute grouped queries for other numbers of heads
        tracing.fix_size("the number of query heads", query, 1)
        tracing.fix_size("the number of key heads", key, 1)
    bias, mask = _scores(query, attn_mask)
    options = Options(scale=scale, right=0 if is_causal else None, alignment=alignment, dropout_p=dropout_p)
    extras = NO_EXTRAS if bias is mask is None else Extras(bias=bias, mask=mask)
    inputs = Inputs(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), extras)
    out, _ = functional.attention(inputs, options, None, False, None)
    out = out.transpose(1, 2)
    return out if leading is None else out.reshape(leading + out.shape[-2:])


def _alignment(triangle: Any, query: Tensor, key: Tensor) -> str:
    """Return the alignment of torch's CausalBias, whose sizes must match the scores."""
    sizes, given = (triangle.seq_len_q, triangle.seq_len_kv), (query.shape[-2], key.shape[-2])
    if sizes != given:
        raise ValueError(
            f"attn_mask must be a CausalBias of {given[0]} queries and {given[1]} keys, "
            f"got one of {sizes[0]} queries and {sizes[1]} keys."
        )
    return "top-left" if triangle.variant.name == "UPPER_LEFT" else "bottom-right"


def _fits(shapes: Sequence[Shape], enable_gqa: bool) -> bool:
    """Return whether nothing has to be broadcast. One key head for all queries is grouped-query attention already."""
    query, key, value = shapes
    if not (len(query) == len(key) == len(value) == 4 and query[0] == key[0] == value[0]):
        return False
    nheads_kv = key[1]
    return value[1] == nheads_kv and (enable_gqa or nheads_kv == 1 or nheads_kv == query[1])


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, shapes: Sequence[Shape], enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Shape]:
    """Return views (batch, nheads, seqlen, head_dim) and the result's leading dimensions with heads.

    Inputs with more than one leading dimension are copied if they are broadcast.
    """
    given = (query, key, value)
    if tracing.active():
        for name, x in zip(("query", "key", "value", "attn_mask"), (*given, attn_mask), strict=True):
            if x is not None:
                tracing.fix_shape(name, x)
    nheads = [shape[-3] if len(shape) > 2 else 1 for shape in shapes]
    if not enable_gqa:
        most = max(nheads)
        # Dynamo does not find a symbol in a tuple.
        if any(heads != 1 and heads != most for heads in nheads):  # noqa: PLR1714
            raise ValueError(
                f"query, key and value must have the same number of heads or 1, got {nheads}. "
                "Pass enable_gqa=True for grouped queries."
            )
        nheads = [most] * 3 if nheads[1:] != [1, 1] else nheads
    try:
        batch = torch.broadcast_shapes(*[shape[:-3] for shape in shapes])
    except RuntimeError as error:
        found = [tuple(shape) for shape in shapes]
        raise ValueError(f"query, key and value must broadcast in their leading dimensions, got {found}.") from error
    size = math.prod(batch)
    query, key, value = (
        x.expand(*batch, heads, *x.shape[-2:]).reshape(size, heads, *x.shape[-2:])
        for x, heads in zip(given, nheads, strict=True)
    )
    if attn_mask is not None and attn_mask.ndim > 3:
        shared = math.prod(tracing.sizes(attn_mask)[:-3]) == 1
        attn_mask = attn_mask if shared else attn_mask.expand(*batch, *attn_mask.shape[-3:])
        attn_mask = attn_mask.reshape(1 if shared else size, *attn_mask.shape[-3:])
    leading = (*batch, nheads[0]) if max([len(shape) for shape in shapes]) > 2 else ()
    return query, key, value, attn_mask, leading


def _scores(query: Tensor, attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return (bias, mask)."""
    if attn_mask is None:
        return None, None
    attn_mask = kinds.dense("attn_mask", attn_mask)
    if attn_mask.dtype is torch.bool:
        return None, attn_mask
    if attn_mask.dtype not in (query.dtype, torch.float32):
        raise TypeError(
            f"attn_mask must be bool, float32 or of query's dtype {query.dtype}, got {attn_mask.dtype}. "
            "Pass a bool mask."
        )
    return attn_mask.to(torch.float64) if query.dtype is torch.float64 else attn_mask, None
