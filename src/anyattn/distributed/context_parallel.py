"""Unmodified models over several processes: PyTorch's scaled_dot_product_attention computes over the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .api import attention
from .request import find_ranks
from .sharding import Sharding


@contextmanager
def context_parallel(
    *, group: Any = None, sharding: str | Sharding = "contiguous", schedule: str = "auto"
) -> Iterator[None]:
    """Compute every scaled_dot_product_attention in the block over the ranks of a group.

    The model gets this rank's rows of the sequence and must be given their positions (`sharding.positions(rank)`), for
    example as position_ids. Gradients of parameters are this rank's contributions: add them over the group, as
    DistributedDataParallel does. Causal masks are aligned to the top left, as in PyTorch. An attn_mask has this rank's
    queries and all keys of the whole sequence. Like torch's context manager, it replaces
    torch.nn.functional.scaled_dot_product_attention in this process, so run the backward pass inside or outside the
    block, but no other thread's attention.

    Args:
        group: as for `attention`.
        sharding: as for `attention`.
        schedule: as for `attention`.

    Raises:
        RuntimeError: contexts are nested.

    >>> import torch, anyattn.distributed as ad
    >>> _ = torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    >>> q = k = v = torch.ones(1, 2, 8, 16)  # (batch, nheads, rows, head_dim)
    >>> with ad.context_parallel(sharding="zigzag"):
    ...     torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([1, 2, 8, 16])
    >>> torch.distributed.destroy_process_group()
    """
    find_ranks(group, schedule)
    original = F.scaled_dot_product_attention
    if getattr(original, "__module__", None) == __name__:
        raise RuntimeError("context_parallel must not be nested. Leave the outer block first.")

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.ndim != 4:
            raise ValueError(f"query must be (batch, nheads, rows, head_dim), got {tuple(query.shape)}.")
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"key must have query's {query.shape[1]} heads, got {key.shape[1]}. Pass enable_gqa=True for fewer."
            )
        if attn_mask is not None and is_causal:
            raise ValueError("attn_mask must be None with is_causal=True, got a tensor. Add the causal mask to it.")
        kind = None if attn_mask is None else "mask" if attn_mask.dtype is torch.bool else "bias"
        out: Tensor = attention(
            *(x.transpose(1, 2) for x in (query, key, value)), group=group, sharding=sharding, schedule=schedule,
            causal=is_causal, alignment="top-left", dropout_p=dropout_p, scale=scale,
            **({} if kind is None else {kind: attn_mask}),
        )  # fmt: skip
        return out.transpose(1, 2)

    F.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
