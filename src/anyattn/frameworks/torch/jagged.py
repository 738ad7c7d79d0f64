"""Attention of torch's jagged nested tensors (batch, nheads, {seqlen}, head_dim), computed as packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...definition.inputs import Extras, Inputs
from ...definition.options import Options
from . import functional

NAME = "jagged_scaled_dot_product_attention"  # in torch.nested._internal.ops


def sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the nested tensor that torch returns: query's sequences, value's head_dim.

    Causal: query i attends to keys 0 to i.

    Raises:
        NotImplementedError: an unsupported combination: another layout, another ragged dimension, or a mask.
        ValueError: sizes or sequences do not match.
    """
    reason = refusal(query, key, value, attn_mask)
    if reason is not None:
        raise NotImplementedError(reason)
    nheads, nheads_kv = query.shape[1], key.shape[1]
    grouped = enable_gqa or nheads_kv == 1
    if value.shape[1] != nheads_kv or (nheads_kv != nheads and not grouped):
        raise ValueError(
            f"query, key and value must have the same number of heads, or key and value 1, got "
            f"{[nheads, nheads_kv, value.shape[1]]}. Pass enable_gqa=True for grouped queries."
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, {seqlen}, nheads, head_dim)
    _check_sequences(k, v)
    options = Options(scale=scale, right=0 if is_causal else None, alignment="top-left", dropout_p=dropout_p)
    extras = Extras(cu_seqlens_q=q.offsets(), cu_seqlens_k=k.offsets(), seqused_q=q.lengths(), seqused_k=k.lengths())
    out, _ = functional.attention(Inputs(q.values(), k.values(), v.values(), extras), options, None, False, None)
    longest = {"min_seqlen": query._maybe_min_seqlen, "max_seqlen": query._maybe_max_seqlen}
    nested = torch.nested.nested_tensor_from_jagged(out, q.offsets(), q.lengths(), jagged_dim=1, **longest)
    return nested.transpose(1, 2)


def refusal(query: Any, key: Any, value: Any, attn_mask: Tensor | None) -> str | None:
    """Return why these arguments are not supported, or None."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_nested or x.layout is not torch.jagged:
            return f"{name} must be a nested tensor of layout torch.jagged like the others, got layout {x.layout}."
        if x.ndim != 4 or x._ragged_idx != 2:
            return f"{name} must be (batch, nheads, seqlen, head_dim) and ragged only in seqlen, got {tuple(x.shape)}."
    if attn_mask is not None:
        return "attn_mask must be None with nested tensors, got a dense mask. Pass is_causal instead."
    return None


def _check_sequences(k: Any, v: Any) -> None:
    """Check that keys and values hold the same sequences. Tensors with the same offsets need no check of values."""
    for one, other in ((k.offsets(), v.offsets()), (k.lengths(), v.lengths())):
        if one is other:
            continue
        if one is None or other is None or not torch.equal(one, other):
            raise ValueError(
                "key and value must hold the same sequences, got others. Build both with the same offsets."
            )


class Hook:
    """Replacement of torch's CPU attention of jagged tensors, which stores every score, until `remove`.

    On a GPU, torch calls the operator of packed sequences. Unsupported calls go to torch's function.
    """

    def __init__(self) -> None:
        from torch.nested._internal import ops

        self.module: Any = ops
        self.original: Any = getattr(ops, NAME, None)
        self.active = self.original is not None
        if self.active:
            setattr(ops, NAME, self.attend)

    def attend(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **keywords: Any) -> Any:
        """Return the result of F.scaled_dot_product_attention for nested tensors."""
        here = self.active and query.device.type == "cpu" and refusal(query, key, value, attn_mask) is None
        return (sdpa if here else self.original)(query, key, value, attn_mask, *rest, **keywords)

    def remove(self) -> None:
        """Restore torch's function, unless a later hook has replaced it."""
        if self.active and getattr(self.module, NAME) == self.attend:
            setattr(self.module, NAME, self.original)
        self.active = False
