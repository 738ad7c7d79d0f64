"""`xformers.ops.memory_efficient_attention` computed by anyattn, with the biases that models use.

    from anyattn.compat.xformers import LowerTriangularMask, memory_efficient_attention

Bias objects of xFormers are accepted too, if their class has one of the names below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import api


class LowerTriangularMask:
    """Causal mask aligned to the top left: query i attends to keys 0 to i."""


class LowerTriangularFromBottomRightMask:
    """Causal mask aligned to the bottom right: the last query is aligned with the last key."""


@dataclass(frozen=True)
class SequenceInfo:
    """Boundaries of packed sequences, int32 (batch + 1,)."""

    seqstart: Tensor

    @classmethod
    def from_seqlens(cls, seqlens: Sequence[int]) -> SequenceInfo:
        return cls(torch.tensor([0, *seqlens]).cumsum(0).int())


@dataclass(frozen=True)
class BlockDiagonalMask:
    """Mask of sequences packed in a batch of one: query block i attends to key block i.

    >>> import torch
    >>> from anyattn.compat.xformers import BlockDiagonalMask, memory_efficient_attention
    >>> x = torch.ones(1, 7, 2, 8)
    >>> memory_efficient_attention(x, x, x, BlockDiagonalMask.from_seqlens([3, 4]).make_causal()).shape
    torch.Size([1, 7, 2, 8])
    """

    q_seqinfo: SequenceInfo
    k_seqinfo: SequenceInfo

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None) -> Any:
        """Return the mask of sequences with these lengths. kv_seqlen: default q_seqlen."""
        info = SequenceInfo.from_seqlens(q_seqlen)
        other = info if kv_seqlen is None else SequenceInfo.from_seqlens(kv_seqlen)
        if other.seqstart.shape != info.seqstart.shape:
            raise ValueError(f"kv_seqlen must have as many sequences as q_seqlen, got {kv_seqlen} and {q_seqlen}.")
        return cls(info, other)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Block-diagonal mask that is causal in each block, aligned to its top left."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Block-diagonal mask that is causal in each block, aligned to its bottom right."""


_TOP_LEFT = {"causal": True, "alignment": "top-left"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "LowerTriangularMask": _TOP_LEFT,
    "LowerTriangularFromBottomRightMask": {"causal": True},
    "BlockDiagonalMask": {},
    "BlockDiagonalCausalMask": _TOP_LEFT,
    "BlockDiagonalCausalFromBottomRightMask": {"causal": True},
}


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute attention in xFormers' layout, differentiable in query, key, value and a tensor attn_bias.

    Args:
        query: (batch, seqlen_q, nheads, head_dim); or (batch, seqlen_q, head_dim), one head; or (batch, seqlen_q,
            groups, nheads, head_dim), in which the heads of a group share key and value.
        key: (batch, seqlen_k, ...) in the same layout. The heads of a group are expanded, or 1.
        value: like key, with head_dim_v.
        attn_bias: None; a tensor that is added to the scaled scores, (batch, nheads, seqlen_q, seqlen_k) (one head:
            (batch, seqlen_q, seqlen_k); groups: (batch, groups, nheads, seqlen_q, seqlen_k)); or a mask of this module.
        p: dropout probability, applied whenever > 0.
        scale: default head_dim ** -0.5.
        op: xFormers' choice of a kernel; no effect.
        output_dtype: dtype of the result; default query's dtype.

    Returns:
        query's shape with value's last dimension.

    Raises:
        ValueError: an argument is wrong, or attn_bias is of another class.
    """
    if query.ndim not in (3, 4, 5) or not query.ndim == key.ndim == value.ndim:
        shapes = [tuple(x.shape) for x in (query, key, value)]
        raise ValueError(f"query, key and value must all have 3, 4 or 5 dimensions, got {shapes}.")
    shape = (*query.shape[:-1], value.shape[-1])
    if query.ndim == 3:
        query, key, value = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if query.ndim == 5:
        shared = all(x.shape[3] == 1 or x.stride(3) == 0 for x in (key, value))  # one head for the whole group
        query = query.flatten(2, 3)
        key, value = (x[:, :, :, 0] if shared else x.flatten(2, 3) for x in (key, value))
    options: dict[str, Any] = {"dropout_p": p, "scale": scale}
    if type(attn_bias).__name__ not in _OPTIONS and (attn_bias is None or isinstance(attn_bias, Tensor)):
        bias = attn_bias
        if bias is not None and len(shape) != 4:
            bias = bias.unsqueeze(1) if len(shape) == 3 else bias.flatten(1, 2)
        out: Tensor = api.attention(query, key, value, bias=bias, **options)
    else:
        out = _masked(query, key, value, attn_bias, options)
    return out.reshape(shape) if output_dtype is None else out.reshape(shape).to(output_dtype)


def _masked(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, options: dict[str, Any]) -> Tensor:
    name = type(attn_bias).__name__
    if name not in _OPTIONS:
        raise ValueError(f"attn_bias must be None, a tensor or one of {', '.join(_OPTIONS)}, got {name}.")
    options.update(_OPTIONS[name])
    if not name.startswith("BlockDiagonal"):
        dense: Tensor = api.attention(query, key, value, **options)
        return dense
    if query.shape[0] != 1 or key.shape[0] != 1:
        raise ValueError(
            f"attn_bias {name} needs a batch of 1, got query {tuple(query.shape)}, key {tuple(key.shape)}."
        )
    begins = (attn_bias.q_seqinfo.seqstart.to(query.device), attn_bias.k_seqinfo.seqstart.to(query.device))
    for label, x, begin in (("query", query, begins[0]), ("key", key, begins[1])):
        if x.shape[1] != int(begin[-1]):
            raise ValueError(
                f"{label} must have {int(begin[-1])} rows, the sum of attn_bias's sequences, got {x.shape[1]}."
            )
    packed: Tensor = api.attention_varlen(query[0], key[0], value[0], *begins, **options)
    return packed
