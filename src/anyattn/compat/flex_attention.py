"""torch.nn.attention.flex_attention by anyattn: the same names and signatures, with gradients on a CPU.

    from anyattn.compat.flex_attention import create_block_mask, flex_attention

torch's own BlockMask is accepted and returned. `create_block_mask` bounds the mask function on whole blocks instead of
looking at every pair. `use_anyattn` replaces `flex_attention` inside torch for a `with` block.

score_mod and mask_mod are traced (docs/score-functions.md): functions that branch on values, write, or reduce raise an
error that names the line. Tensors on a GPU use the Triton backend, which has not been run on a real GPU yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.attention.flex_attention as original
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_mask, noop_mask, or_masks

from .. import api, block_masks
from ..definition.score.blocks import FULL, MIXED

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
    "use_anyattn",
]

RANK = 4
WHOLE = 2**30  # a block of this size is the whole mask, for any lengths


class _AuxRequest(NamedTuple):
    """Auxiliary results to compute."""

    lse: bool = False
    max_scores: bool = False


class _AuxOutput(NamedTuple):
    """Auxiliary results; None: not requested."""

    lse: Tensor | None = None
    max_scores: Tensor | None = None


AuxRequest: Any = getattr(original, "AuxRequest", _AuxRequest)  # torch 2.6 has neither
AuxOutput: Any = getattr(original, "AuxOutput", _AuxOutput)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Compute attention with a score function and a block mask, differentiable also in the tensors that they read.

    Args:
        query: (batch, nheads, seqlen_q, head_dim).
        key: (batch or 1, nheads_kv, seqlen_k, head_dim).
        value: (batch or 1, nheads_kv, seqlen_k, head_dim_v).
        score_mod: (score, b, h, q_idx, kv_idx) -> score.
        block_mask: torch's BlockMask; None: every query attends to every key.
        scale: default head_dim ** -0.5.
        enable_gqa: required if nheads and nheads_kv differ.
        return_lse: also return lse (batch, nheads, seqlen_q).
        kernel_options: hints for GPU kernels, which do not change results. They have no effect.
        return_aux: AuxRequest(lse=True) returns (out, AuxOutput(lse)).

    Returns:
        out (batch, nheads, seqlen_q, head_dim_v), contiguous as (batch, seqlen_q, nheads, head_dim_v); with return_lse
        or return_aux a pair.

    Raises:
        ValueError: shapes do not match. NotImplementedError: max_scores, or a function that cannot be traced.

    >>> import torch
    >>> from anyattn.compat.flex_attention import create_block_mask, flex_attention
    >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
    >>> bias = torch.zeros(2, 64, requires_grad=True)
    >>> causal = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 64, 64, device="cpu")
    >>> out = flex_attention(q, q, q, lambda score, b, h, q_idx, kv_idx: score + bias[h, kv_idx], block_mask=causal)
    >>> out.sum().backward()
    >>> bias.grad.shape
    torch.Size([2, 64])
    """
    _check(query, key, value, enable_gqa)
    if return_lse and return_aux is not None:
        raise ValueError("return_lse cannot be combined with return_aux. Use return_aux=AuxRequest(lse=True).")
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("return_aux must not request max_scores, which are not computed. Request lse.")
    batch = query.shape[0]
    q, k, v = (x.expand(batch, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    mask = None if block_mask is None else as_mask(block_mask, query, key)
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    out, lse = api.attention(q, k, v, scale=scale, score_mod=score_mod, mask_mod=mask, return_lse=True)
    out = out.transpose(1, 2)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if want_lse else None)
    return (out, lse) if return_lse else out


def _check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != RANK:
            raise NotImplementedError(f"{name} must have 4 dimensions (batch, nheads, seqlen, head_dim), got {x.ndim}.")
    if key.shape[0] not in (1, query.shape[0]) or value.shape[0] != key.shape[0]:
        raise ValueError(
            f"key and value must have query's batch {query.shape[0]} or 1, got {key.shape[0]} and {value.shape[0]}."
        )
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads, got {key.shape[1]}. Pass enable_gqa=True for grouped heads."
        )


def as_mask(block_mask: Any, query: Tensor, key: Tensor) -> Callable[..., Any]:
    """Return torch's BlockMask as a mask function of anyattn. Blocks that it does not list are skipped.

    If its blocks are certainly those of its mask function, this is the function itself, which may be recognized.
    """
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask or None, got {type(block_mask).__name__}.")
    lengths, given = (query.shape[2], key.shape[2]), tuple(block_mask.seq_lengths)
    if given != lengths and min(block_mask.BLOCK_SIZE) < WHOLE:
        raise ValueError(f"block_mask must be for lengths {lengths} of query and key, got one for {given}.")
    needed, listed = -(-lengths[0] // block_mask.BLOCK_SIZE[0]), block_mask.kv_num_blocks.shape[-1]
    if listed != needed:
        raise ValueError(
            f"block_mask must have {needed} rows of blocks for {lengths[0]} queries, got {listed}. "
            "Set seq_lengths of a BlockMask that was sliced."
        )
    for axis, name, size in ((0, "batch", query.shape[0]), (1, "nheads", query.shape[1])):
        found = block_mask.kv_num_blocks.shape[axis]
        if found not in (1, size):
            raise ValueError(f"block_mask must have {name} {size} or 1, got {found}.")
    *rows, keys = _blocks(block_mask)
    kinds = torch.zeros((*rows, keys + 1), dtype=torch.int32, device=query.device)  # the last column takes the rest
    _mark(kinds, block_mask.kv_num_blocks, block_mask.kv_indices, MIXED)
    if block_mask.full_kv_num_blocks is not None:
        _mark(kinds, block_mask.full_kv_num_blocks, block_mask.full_kv_indices, FULL)
    sizes = (block_mask.BLOCK_SIZE[0], block_mask.BLOCK_SIZE[1])
    ours = block_masks.BlockMask(kinds[..., :keys], sizes, block_mask.mask_mod)
    if torch.compiler.is_dynamo_compiling():  # the values of the lists are not known
        return ours
    if block_masks.is_redundant(ours, (*query.shape[:3], key.shape[2])):
        function: Callable[..., Any] = block_mask.mask_mod
        return function
    return ours


def _blocks(block_mask: Any) -> tuple[int, ...]:
    """Return (batch, nheads, q_blocks, k_blocks)."""
    keys = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    return (*block_mask.kv_num_blocks.shape, max(keys, block_mask.kv_indices.shape[-1]))


def _mark(kinds: Tensor, counts: Tensor, indices: Any, kind: int) -> None:
    """Set the kind of the first `counts` blocks in each list."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    kinds.scatter_(-1, torch.where(listed, indices, kinds.shape[-1] - 1).long(), kind)


def create_block_mask(
    mask_mod: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> Any:
    """Build torch's BlockMask of a mask function from bounds of whole blocks, without looking at any pair.

    A block whose bounds do not decide counts as partial, so a list of partial blocks may be longer than torch's. The
    results of attention are the same.

    Args:
        mask_mod: (b, h, q_idx, kv_idx) -> bool.
        B: batch; None: 1.
        H: query heads; None: 1.
        Q_LEN: number of queries.
        KV_LEN: number of keys.
        device: of the BlockMask; default: the accelerator, or the CPU.
        BLOCK_SIZE: pairs in a block, one number or (queries, keys).
        _compile: has no effect.
        separate_full_blocks: list full blocks separately, so that the function is not computed on them.
        compute_dq_write_order: a hint for GPUs, which has no effect.
        dq_kv_order: a hint for GPUs, which has no effect.

    Returns:
        a torch.nn.attention.flex_attention.BlockMask.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        device = found or "cpu"
    sizes = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
    ours = block_masks.block_mask(mask_mod, *sizes, block_size=BLOCK_SIZE)
    kinds = np.minimum(ours.kinds, MIXED) if not separate_full_blocks else ours.kinds
    counts, lists = _lists(kinds == MIXED, device)
    full_counts, full_lists = _lists(kinds == FULL, device) if separate_full_blocks else (None, None)
    return BlockMask.from_kv_blocks(
        counts,
        lists,
        full_counts,
        full_lists,
        BLOCK_SIZE=ours.block_size,
        mask_mod=mask_mod,
        seq_lengths=(Q_LEN, KV_LEN),
    )


def _lists(listed: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Return the number of listed blocks of each row, and all blocks with the listed ones first, in order."""
    order = np.argsort(~listed, axis=-1, kind="stable").astype(np.int32)
    counts = listed.sum(axis=-1, dtype=np.int32)
    return torch.from_numpy(counts).to(device), torch.from_numpy(order).to(device)


@contextmanager
def use_anyattn() -> Iterator[None]:
    """Replace torch's `flex_attention` for tensors on a CPU inside the `with` block, in every thread.

    Calls through `torch.nn.attention.flex_attention.flex_attention` are replaced, and transformers' models with
    `attn_implementation="flex_attention"` call it, if transformers is imported. A module that imported the function by
    name before keeps torch's.

    >>> import torch.nn.attention.flex_attention as flex
    >>> x = torch.ones(1, 2, 16, 8, requires_grad=True)
    >>> with use_anyattn():
    ...     flex.flex_attention(x, x, x).sum().backward()
    >>> x.grad.shape
    torch.Size([1, 2, 16, 8])
    """
    places = [(original, "flex_attention", flex_attention), *_transformers_functions()]
    before = [getattr(module, name) for module, name, _ in places]
    for (module, name, ours), theirs in zip(places, before, strict=True):
        setattr(module, name, _on_cpu(ours, theirs))
    try:
        yield
    finally:
        for (module, name, _), theirs in zip(places, before, strict=True):
            setattr(module, name, theirs)


def _on_cpu(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `ours` for a tensor or a device of the CPU, and `theirs` for others."""

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        query = arguments[0] if arguments else keywords.get("query")
        device = query.device if isinstance(query, Tensor) else keywords.get("device")
        is_cpu = device is not None and torch.device(device).type == "cpu"
        return (ours if is_cpu else theirs)(*arguments, **keywords)

    return replacement


def _transformers_functions() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return the functions of transformers that compile torch's, as (module, name, replacement)."""
    if "transformers" not in sys.modules:
        return []
    import transformers.integrations.flex_attention as integration
    import transformers.masking_utils as masks

    def attend(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **keywords: Any) -> Any:
        return flex_attention(query, key, value, **keywords)

    return [
        (integration, "compile_friendly_flex_attention", attend),
        (integration, "create_block_mask", create_block_mask),
        (masks, "create_block_mask", create_block_mask),
    ]
