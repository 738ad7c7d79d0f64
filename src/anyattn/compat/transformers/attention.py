"""The attention function for transformers' models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import api
from .masks import ATTRIBUTE, Pattern, cumulative


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (batch, nheads, seqlen_q, head_dim), out (batch, seqlen_q, nheads, head_dim_v).

    sliding_window counts the keys that a row sees, itself included; s_aux are the sinks; position_bias is added to the
    scores. There are no weights to return: output_attentions=True raises.
    """
    if kwargs.get("output_attentions"):
        raise ValueError('output_attentions=True needs attn_implementation="eager": the weights are never in memory')
    if kwargs.get("sinks") is not None:
        raise ValueError("sinks of more than one value per head are not supported: use attn_implementation='eager'")
    if kwargs.get("cache") is not None:
        raise ValueError("continuous batching has caches of its own: transformers accepts few implementations there")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sink": s_aux, "dropout_p": dropout}
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    pattern = _pattern(q, k, attention_mask, causal, sliding_window, kwargs)
    if pattern is not None and pattern.cu_seqlens_q is not None:
        if position_bias is not None:
            raise ValueError("position_bias cannot be combined with packed sequences")
        return _packed(q, k, v, pattern, options), None
    bias = position_bias
    if pattern is not None:
        options.update({"window": (pattern.left, pattern.right), "offset": pattern.offset})
        attention_mask = None if attention_mask is None or not pattern.padded else attention_mask[:, None, None].bool()
    if attention_mask is not None and attention_mask.is_floating_point():
        bias, attention_mask = attention_mask if bias is None else bias + attention_mask, None
    return api.attention(q, k, v, bias=bias, mask=attention_mask, **options), None


def _pattern(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, sliding_window: int | None, kwargs: dict[str, Any]
) -> Pattern | None:
    """What the mask says; None: it is dense and says everything itself.

    A mask that is None or came without a Pattern means what it means to transformers' SDPA and FlashAttention: keys
    beyond the rows are the unused end of a static cache, but for a single row, which sees them all.
    """
    found: Pattern | None = getattr(mask, ATTRIBUTE, None)
    if found is None and mask is not None and mask.ndim != 2:
        return None
    if found is None:
        behind = k.shape[1] - q.shape[1]
        causal = causal and q.shape[1] > 1
        left = None if sliding_window is None else sliding_window - 1
        found = Pattern(left, 0 if causal else left, 0 if causal and mask is None else behind, mask is not None)
    if found.padded or found.cu_seqlens_q is not None:
        return found
    begins_q, begins_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if begins_q is None or begins_k is None:
        begins_q = begins_k = _begins(kwargs.get("position_ids"), q, k)
    return Pattern(found.left, found.right, found.offset, found.padded, begins_q, begins_k)


def _begins(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """cu_seqlens of position_ids that come back to where they began, in a batch of one; or None."""
    if torch.compiler.is_compiling() or position_ids is None or q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        return None
    if position_ids.shape != q.shape[:2]:
        return None
    starts = position_ids[:, 1:] == position_ids[:, :1]
    return cumulative(starts) if bool(starts.any()) else None


def _packed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: dict[str, Any]) -> Tensor:
    arrays: Any = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), pattern.cu_seqlens_q, pattern.cu_seqlens_k)
    out: Tensor = api.attention_varlen(*arrays, window=(pattern.left, pattern.right), **options)
    return out.reshape(*q.shape[:2], *out.shape[1:])
