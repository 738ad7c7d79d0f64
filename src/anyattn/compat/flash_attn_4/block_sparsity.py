"""Block lists of flash_attn 4, and the boolean mask that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...scalars import integer
from .._flash_attn_common.calls import pair

__all__ = ["BlockSparseTensorsTorch"]

Sizes = tuple[int, int, int, int]  # batch, nheads, seqlen_q, seqlen_k


class BlockSparseTensorsTorch(NamedTuple):
    """Blocks of keys that each block of queries attends to, or blocks of queries per block of keys for a backward pass.

    Attributes:
        mask_block_cnt: int32 (batch, nheads, q_blocks), number of listed blocks; batch and nheads may be 1.
        mask_block_idx: int32 (batch, nheads, q_blocks, n), the listed blocks, each at most once.
        full_block_cnt: number of further blocks. Without a mask_mod, both lists have the same meaning.
        full_block_idx: further blocks.
        cu_total_m_blocks: for packed sequences, which are not supported.
        cu_block_idx_offsets: a hint for GPUs.
        block_size: (queries, keys) of a block.
        dq_write_order: a hint for GPUs.
        dq_write_order_full: a hint for GPUs.
        spt: a hint for GPUs.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def sparse_mask(
    tensors: Any, q: Any, k: Any, excluded: Sequence[Any], page_table: Any = None, *, by_keys: bool = False
) -> Tensor | None:
    """Return the mask of a call's block_sparse_tensors, or None without any.

    excluded: qv and the cumulative lengths of packed sequences, which cannot be combined with block lists.
    """
    if tensors is None:
        return None
    if any(x is not None for x in excluded):
        raise NotImplementedError("block_sparse_tensors with qv, cu_seqlens_q or cu_seqlens_k is not supported.")
    pages = 1 if page_table is None else page_table.shape[1]
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1] * pages)
    return block_mask("block_sparse_tensors", tensors, sizes, by_keys=by_keys)


def check_same_blocks(mask: Tensor | None, tensors_bwd: Any, q: Any, k: Any) -> None:
    """Raise ValueError unless block_sparse_tensors_bwd lists the blocks of the mask, as gradients require."""
    if tensors_bwd is None:
        return
    if mask is None:
        raise ValueError("block_sparse_tensors_bwd needs block_sparse_tensors, got none.")
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    other = block_mask("block_sparse_tensors_bwd", tensors_bwd, sizes, by_keys=True)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool((mask != other).any()):
        raise ValueError("block_sparse_tensors_bwd must list the blocks of block_sparse_tensors, got others.")


def block_mask(name: str, tensors: Any, sizes: Sizes, *, by_keys: bool = False) -> Tensor:
    """Return the mask (batch or 1, nheads or 1, seqlen_q, seqlen_k) of the listed blocks.

    Args:
        name: name of the argument, for errors.
        tensors: the lists.
        sizes: (batch, nheads, seqlen_q, seqlen_k).
        by_keys: the lists hold query blocks for each block of keys, as in a backward pass.

    Raises:
        NotImplementedError: lists of packed sequences, or without a block size, which a GPU kernel would choose.
        ValueError: a shape, a count or an index does not fit.
    """
    if tensors.cu_total_m_blocks is not None or tensors.mask_block_cnt.ndim == 2:
        raise NotImplementedError(f"{name} of packed sequences is not supported, because a mask has no packed layout.")
    if tensors.block_size is None:
        raise NotImplementedError(f"{name} must have a block_size, got None. Pass block_size=(queries, keys).")
    queries, keys = (integer("block_size", size) for size in pair("block_size", tensors.block_size))
    if queries < 1 or keys < 1:
        raise ValueError(f"{name} must have a block_size of positive numbers, got {tensors.block_size}.")
    batch, nheads, seqlen_q, seqlen_k = sizes
    counts = (batch, nheads, -(-seqlen_q // queries), -(-seqlen_k // keys))
    if by_keys:
        counts = (batch, nheads, counts[3], counts[2])
    blocks = _listed(f"{name}.mask_block", tensors.mask_block_cnt, tensors.mask_block_idx, counts)
    if tensors.full_block_cnt is not None or tensors.full_block_idx is not None:
        full = _listed(f"{name}.full_block", tensors.full_block_cnt, tensors.full_block_idx, counts)
        if blocks.device.type == "cpu" and not torch.compiler.is_compiling() and bool((blocks & full).any()):
            raise ValueError(f"{name} must list each block once, got blocks that are in both lists.")
        blocks = blocks | full
    blocks = blocks.transpose(-1, -2) if by_keys else blocks
    mask = blocks.repeat_interleave(queries, -2)[..., :seqlen_q, :]
    return mask.repeat_interleave(keys, -1)[..., :seqlen_k]


def _listed(name: str, count: Any, index: Any, counts: Sizes) -> Tensor:
    """Return which blocks are listed, (batch or 1, nheads or 1, lists, blocks)."""
    if count is None or index is None:
        raise ValueError(f"{name}_cnt and {name}_idx must be passed together, got one of them.")
    *lead, blocks = counts
    fits = index.ndim == 4 and index.shape[-1] <= blocks and count.ndim == 3 and count.shape[2] == lead[2]
    if (
        not fits
        or index.shape[:-1] != count.shape
        or any(size not in (1, want) for size, want in zip(count.shape[:2], lead, strict=False))
    ):
        raise ValueError(
            f"{name}_cnt and {name}_idx must be {(*lead,)} and {counts}, or of 1 in the first two, "
            f"got {tuple(count.shape)} and {tuple(index.shape)}."
        )
    index = index.long()
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    # Entries that are not listed go to a block after the last, which is dropped.
    index = torch.where(listed, index, blocks)
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        _check(name, count, index, listed, blocks)
    found = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    return found.scatter_(-1, index, True)[..., :blocks]


def _check(name: str, count: Tensor, index: Tensor, listed: Tensor, blocks: int) -> None:
    if bool(((count < 0) | (count > index.shape[-1])).any()):
        found = f"{int(count.min())} to {int(count.max())}"
        raise ValueError(f"{name}_cnt must be 0 to {index.shape[-1]}, the length of a list, got {found}.")
    if bool((listed & ((index < 0) | (index >= blocks))).any()):
        low, high = (int(bound) for bound in index[listed].aminmax())
        raise ValueError(f"{name}_idx must be 0 to {blocks - 1}, the numbers of the blocks, got {low} to {high}.")
    ordered = index.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < blocks)).any()):
        raise ValueError(f"{name}_idx must list each block once, got a block that is listed twice.")
