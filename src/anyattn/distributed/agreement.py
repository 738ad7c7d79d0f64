"""Check that all ranks of a group pass the same arguments, before any data is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

Group = Any  # a ProcessGroup, or None for the default group


def agree(
    groups: Sequence[Group],
    arguments: Mapping[str, Any],
    rows: Sequence[int],
    error: Exception | None,
    device: torch.device,
) -> list[tuple[int, ...]]:
    """Return the `rows` of every rank, in the order of ranks; groups: outermost first.

    Raises:
        ValueError: on every rank, if a rank has another value of an argument, or if a rank reports an error.
    """
    digest = hashlib.blake2b(repr(sorted(arguments.items())).encode(), digest_size=7).digest()
    own = torch.tensor([error is None, int.from_bytes(digest, "little"), *rows], dtype=torch.int64, device=device)
    found = own[None]
    for group in reversed(groups):
        found = _gather(group, found)
    table: list[list[int]] = found.tolist()
    if any(row[:2] != [1, table[0][1]] for row in table):
        _raise(groups, arguments, error)
    return [tuple(row[2:]) for row in table]


def _gather(group: Group, own: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts)


def _raise(groups: Sequence[Group], arguments: Mapping[str, Any], error: Exception | None) -> None:
    """Raise the error of the first rank that has one, or name the argument in which ranks differ."""
    own = None if error is None else f"{type(error).__name__}: {error}"
    found: list[Any] = [(dict(arguments), own)]
    for group in reversed(groups):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, found, group=group)
        found = [entry for part in parts for entry in part]
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise ValueError(f"rank {rank} reports an error, so no rank computes. {text}")
    first = found[0][0]
    for rank, (other, _) in enumerate(found):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{name} must be equal on all ranks, got {first.get(name)!r} on rank 0 and {other.get(name)!r} "
                    f"on rank {rank}. Pass the same arguments on every rank."
                )
    raise ValueError("arguments must be equal on all ranks. Pass the same arguments on every rank.")
