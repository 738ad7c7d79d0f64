"""Functions that divide a whole tensor over the ranks of a group and join it again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .request import find_ranks
from .sharding import Sharding


def shard(x: Tensor, sharding: Sharding, dim: int = 1, *, group: Any = None) -> Tensor:
    """Return this rank's rows of a tensor that every rank has. Gradients flow back to x.

    Args:
        x: the whole tensor; dimension `dim` is the sequence.
        sharding: which positions each rank has.
        dim: dimension of the sequence.
        group: as for `attention`.

    Returns:
        The rows of this rank, in the order of `sharding.positions(rank)`.

    Raises:
        ValueError: x does not have the sharding's length, or the sharding is for another number of ranks.
    """
    ranks = find_ranks(group, "auto")
    _check_world(sharding, ranks.size)
    return sharding.shard(x, ranks.rank, dim)


def unshard(x: Tensor, sharding: Sharding, dim: int = 1, *, group: Any = None) -> Tensor:
    """Return the whole tensor from the rows of every rank. Every rank calls it and gets the same result.

    Args:
        x: this rank's rows; it must not require a gradient, because ranks may use the result in different ways.
        sharding: which positions each rank has.
        dim: dimension of the sequence.
        group: as for `attention`.

    Returns:
        The whole tensor.

    Raises:
        ValueError: x has another number of rows than the sharding, or requires a gradient.
    """
    ranks = find_ranks(group, "auto")
    _check_world(sharding, ranks.size)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x must not require a gradient. Pass x.detach(), and compute the loss from each rank's rows.")
    lengths = sharding.lengths()
    if x.shape[dim] != lengths[ranks.rank]:
        raise ValueError(f"x must have {lengths[ranks.rank]} rows in dimension {dim}, got {tuple(x.shape)}.")
    padded = x.new_zeros((max(lengths), *x.movedim(dim, 0).shape[1:]))
    padded[: x.shape[dim]] = x.movedim(dim, 0)
    parts = padded[None]
    for one in reversed(ranks.groups()):
        found = [torch.empty_like(parts) for _ in range(dist.get_world_size(one))]
        dist.all_gather(found, parts, group=one)
        parts = torch.cat(found)
    rows = [part[:length].movedim(0, dim) for part, length in zip(parts, lengths, strict=True)]
    return sharding.unshard(rows, dim)


def _check_world(sharding: Sharding, size: int) -> None:
    if sharding.world_size != size:
        raise ValueError(f"sharding must be for the group's {size} ranks, got one for {sharding.world_size}.")
