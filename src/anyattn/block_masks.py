"""Block masks: a mask function with the kind of each block of pairs, found without looking at any pair."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .definition.score.blocks import EMPTY, FULL, MIXED, Sizes, classify
from .definition.score.symbol import Partial
from .definition.score.trace import Traced, trace
from .scalars import integer

EXAMINED = 2**16  # blocks of an explicit mask that are compared with its function


class BlockMask:
    """Mask function that skips blocks. It is itself a mask function: pass it as `mask_mod`.

    A pair is visible if its block is FULL, or if its block is MIXED and `mask_mod` is True.

    Attributes:
        kinds: (batch or 1, nheads or 1, q_blocks, k_blocks), int32: EMPTY 0, MIXED 1 or FULL 2.
        block_size: (queries, keys) of a block.
        mask_mod: the function of MIXED blocks; None: all their pairs are visible.
    """

    def __init__(self, kinds: Any, block_size: tuple[int, int], mask_mod: Callable[..., Any] | None = None) -> None:
        self.kinds, self.block_size, self.mask_mod = kinds, block_size, mask_mod

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        """Return whether pairs are visible. Tensors are read as they are, because torch.compile traces the read."""
        batch, nheads, *blocks = self.kinds.shape
        shared = [(index, size) for index, size in ((b, batch), (h, nheads)) if size != 1]
        kinds = self.kinds.reshape([size for _, size in shared] + blocks)
        place = (*[index for index, _ in shared], q_idx // self.block_size[0], kv_idx // self.block_size[1])
        kind: Any = (kinds if hasattr(kinds, "requires_grad") else Partial(kinds))[place]
        if self.mask_mod is None:
            return kind > EMPTY
        return (kind == FULL) | ((kind == MIXED) & self.mask_mod(b, h, q_idx, kv_idx))

    def __repr__(self) -> str:
        return f"BlockMask(kinds of shape {tuple(self.kinds.shape)}, block_size={self.block_size})"


def block_mask(
    mask_mod: Callable[..., Any],
    batch: int,
    nheads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """Build the block mask of a mask function, in time and memory proportional to the number of blocks.

    Interval arithmetic bounds the function on every block: no pair is looked at. A block counts as mixed if the bounds
    do not decide. Attention with `mask_mod` skips blocks by itself; an explicit block mask is for inspection, and for a
    mask that is used many times.

    Args:
        mask_mod: (b, h, q_idx, kv_idx) -> bool, as for `attention`.
        batch: entries of the batch; 1 if the function does not depend on b.
        nheads: query heads; 1 if the function does not depend on h.
        seqlen_q: number of queries.
        seqlen_k: number of keys.
        block_size: pairs in a block, one number or (queries, keys).

    Returns:
        a BlockMask, to pass as `mask_mod`.

    Raises:
        TypeError, NotImplementedError: the function cannot be traced.
        ValueError: a size is wrong, or a read of a captured array may be out of bounds.

    >>> import anyattn
    >>> causal = anyattn.block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, 1, 1, 256, 256, block_size=64)
    >>> causal.kinds[0, 0].tolist()
    [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]
    """
    sizes = Sizes(*[_size(name, x) for name, x in zip(Sizes._fields, (batch, nheads, seqlen_q, seqlen_k), strict=True)])
    given = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(given) != 2 or any(not isinstance(x, int) or x < 1 for x in given):
        raise ValueError(f"block_size must be one or two integers >= 1, got {block_size!r}.")
    traced = trace_mask(mask_mod)
    kinds = classify(traced.graph, [_host(x) for x in traced.arrays], sizes, given)
    return BlockMask(kinds.astype(np.int32), given, mask_mod)


def is_redundant(mask: BlockMask, sizes: tuple[int, ...]) -> bool:
    """Return whether the blocks of a mask certainly say what its function says. Masks of many blocks are not examined.

    sizes: batch, nheads, seqlen_q and seqlen_k of the call.
    """
    kinds = _host(mask.kinds)
    if mask.mask_mod is None or kinds.size > EXAMINED:
        return False
    traced = trace_mask(mask.mask_mod)
    read = {node.operation for node in traced.graph.nodes}
    if any(name in read and sizes[axis] != kinds.shape[axis] for axis, name in enumerate("bh")):
        return False
    given = Sizes(*kinds.shape[:2], *sizes[2:])
    ours = classify(traced.graph, [_host(x) for x in traced.arrays], given, mask.block_size)
    theirs = kinds[..., : ours.shape[2], : ours.shape[3]]
    mixed = (ours == MIXED) & (theirs == MIXED)
    return bool((mixed | ((ours == EMPTY) & (theirs != FULL)) | ((ours == FULL) & (theirs != EMPTY))).all())


def trace_mask(mask_mod: Callable[..., Any]) -> Traced:
    """Return the graph of a mask function that reads NumPy arrays or, if torch is loaded, tensors."""
    if "torch" not in sys.modules:
        return trace(None, mask_mod)
    from .frameworks.torch.score_functions import traced

    return traced(None, mask_mod)


def _host(array: Any) -> npt.NDArray[Any]:
    """Return the values of a captured array as NumPy computes with them."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64) if array.dtype.kind == "V" else array
    host = array.detach().cpu()
    return np.asarray((host.double() if host.is_floating_point() else host).numpy())


def _size(name: str, value: Any) -> int:
    found = integer(name, value)
    if found < 0:
        raise ValueError(f"{name} must be >= 0, got {found}.")
    return found
