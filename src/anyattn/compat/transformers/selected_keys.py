"""Selected keys of each query, for models with sparse attention (DeepSeek-V3.2, GLM-MoE-DSA, MiniMax-M3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def selected_keys(module: Any, indices: Tensor | None, block_indices: Tensor | None, k: Tensor) -> Tensor | None:
    """Return kv_indices of anyattn.attention: (batch, seqlen_q, n), or (batch, nheads_kv, seqlen_q, n); -1: no key.

    Raises:
        ValueError: the module does not define the block size, or the heads of blocks do not divide the KV heads.
    """
    if block_indices is None:
        return None if indices is None else indices.int()
    block = getattr(getattr(module, "indexer", None), "block_size", None)
    if indices is not None or not isinstance(block, int):
        raise ValueError(
            f"block_indices needs {type(module).__name__}.indexer.block_size and no indices, got {block!r}."
        )
    seqlen_k, nheads_kv, heads = k.shape[1], k.shape[2], block_indices.shape[1]
    if nheads_kv % heads:
        raise ValueError(
            f"block_indices must have a number of heads that divides nheads_kv = {nheads_kv}, got {heads}."
        )
    first = block_indices.unsqueeze(-1) * block
    keys = first + torch.arange(block, device=first.device)
    keys = torch.where((first < 0) | (keys >= seqlen_k), -1, keys).flatten(-2)
    return keys.repeat_interleave(nheads_kv // heads, 1).int()


def key_mask(kv_indices: Tensor, nheads: int, seqlen_k: int, mask: Tensor | None) -> Tensor:
    """Return the boolean mask (batch, 1 or nheads, seqlen_q, seqlen_k) of selected keys that `mask` makes visible."""
    if kv_indices.ndim == 3:
        kv_indices = kv_indices.unsqueeze(1)
    slots = kv_indices.long().masked_fill(kv_indices < 0, seqlen_k)  # an additional column, which is dropped
    keys = torch.zeros(*slots.shape[:-1], seqlen_k + 1, dtype=torch.bool, device=slots.device)
    keys = keys.scatter(-1, slots, True)[..., :-1]
    if keys.shape[1] > 1:
        keys = keys.repeat_interleave(nheads // keys.shape[1], 1)
    return keys if mask is None else keys & mask
