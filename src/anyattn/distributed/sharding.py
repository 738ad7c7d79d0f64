"""Division of a sequence over the ranks of a group: every rank has a list of intervals of global positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("contiguous", "zigzag", "striped")


class Interval(NamedTuple):
    """Global positions start, start + step, ..., `length` of them."""

    start: int
    length: int
    step: int = 1


@dataclass(frozen=True)
class Sharding:
    """Division of a sequence of `length` positions over ranks.

    Ranks may have different numbers of positions, or none, and nothing has to be divisible by the number of ranks.

    Attributes:
        intervals: for each rank, its intervals of global positions, in the order of the rank's rows.

    >>> sharding = Sharding.zigzag(10, 2)
    >>> sharding.lengths(), sharding.positions(0).tolist(), sharding.positions(1).tolist()
    ((5, 5), [0, 1, 7, 8, 9], [2, 3, 4, 5, 6])
    """

    intervals: tuple[tuple[Interval, ...], ...]

    def __post_init__(self) -> None:
        ranks = tuple(_joined(Interval(*interval) for interval in rank) for rank in self.intervals)
        object.__setattr__(self, "intervals", ranks)
        if not ranks:
            raise ValueError("intervals must have an entry for each rank, got none.")
        _check_coverage([interval for rank in ranks for interval in rank], self.length)

    @classmethod
    def contiguous(cls, length: int, world_size: int) -> Sharding:
        """Return the sharding in which rank r has the r-th of `world_size` consecutive parts."""
        edges = _edges(0, length, _check_size(world_size))
        return cls(tuple((Interval(a, b - a),) for a, b in pairwise(edges)))

    @classmethod
    def zigzag(cls, length: int, world_size: int, cu_seqlens: Sequence[int] | None = None) -> Sharding:
        """Return the sharding that balances causal masks: of 2 world_size parts, rank r has part r and the r-th last.

        With cu_seqlens, each document [cu_seqlens[d], cu_seqlens[d + 1]) is divided by itself.
        """
        parts = 2 * _check_size(world_size)
        bounds = [0, length] if cu_seqlens is None else [int(x) for x in cu_seqlens]
        if not bounds or bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(f"cu_seqlens must start at 0 and end at the length {length}, got {bounds}.")
        ranks: list[list[Interval]] = [[] for _ in range(world_size)]
        for first, last in pairwise(bounds):
            edges = _edges(first, last, parts)
            for rank, own in enumerate(ranks):
                own += [Interval(edges[part], edges[part + 1] - edges[part]) for part in (rank, parts - 1 - rank)]
        return cls(tuple(map(tuple, ranks)))

    @classmethod
    def striped(cls, length: int, world_size: int) -> Sharding:
        """Return the sharding in which rank r has the positions r, r + world_size, r + 2 world_size, ..."""
        step = _check_size(world_size)
        return cls(tuple((Interval(r, max(0, -((r - length) // step)), step),) for r in range(step)))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Sharding:
        """Return the sharding of consecutive parts with these lengths, one for each rank."""
        starts = [0, *accumulate(lengths)]
        return cls(tuple((Interval(start, length),) for start, length in zip(starts, lengths, strict=False)))

    @cached_property
    def length(self) -> int:
        """Return the number of positions of the whole sequence."""
        return sum(self.lengths())

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return len(self.intervals)

    def lengths(self) -> tuple[int, ...]:
        """Return the number of positions of each rank."""
        return tuple(sum(interval.length for interval in rank) for rank in self.intervals)

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Return the global positions of a rank's rows, int64, for rotary embeddings, labels and masks."""
        parts = [torch.arange(n, device=device) * step + start for start, n, step in self.intervals[rank]]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Return a rank's rows of the whole x, whose dimension `dim` is the sequence. Gradients flow back to x."""
        if x.shape[dim] != self.length:
            raise ValueError(f"x must have {self.length} rows in dimension {dim}, got {tuple(x.shape)}.")
        parts = [rows_of(x, dim, interval) for interval in self.intervals[rank]]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Return the whole x from the rows of every rank."""
        if tuple(part.shape[dim] for part in parts) != self.lengths():
            found = [part.shape[dim] for part in parts]
            raise ValueError(f"parts must have {list(self.lengths())} rows in dimension {dim}, got {found}.")
        shape = list(parts[0].shape)
        shape[dim] = self.length
        whole = parts[0].new_empty(shape)
        for part, intervals in zip(parts, self.intervals, strict=True):
            row = 0
            for interval in intervals:
                rows_of(whole, dim, interval).copy_(part.narrow(dim, row, interval.length))
                row += interval.length
        return whole

    def group(self, size: int) -> Sharding:
        """Return the sharding over groups of `size` consecutive ranks, each with its positions in ascending order."""
        groups = [self.intervals[first : first + size] for first in range(0, self.world_size, size)]
        return Sharding(tuple(_sorted([i for rank in group for i in rank]) for group in groups))


def rows_of(x: Tensor, dim: int, interval: Interval) -> Tensor:
    """Return a view of the interval's rows of x."""
    index = [slice(None)] * x.ndim
    index[dim] = slice(interval.start, interval.start + interval.length * interval.step, interval.step)
    return x[tuple(index)]


def _check_size(world_size: int) -> int:
    if world_size < 1:
        raise ValueError(f"world_size must be >= 1, got {world_size}.")
    return world_size


def _edges(first: int, last: int, parts: int) -> list[int]:
    """Return the bounds of `parts` nearly equal parts of [first, last)."""
    return [first + (last - first) * part // parts for part in range(parts + 1)]


def _joined(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Return the intervals without empty ones, adjacent ones joined."""
    found: list[Interval] = []
    for interval in intervals:
        if min(interval.start, interval.length) < 0 or interval.step < 1:
            raise ValueError(f"intervals must have start >= 0, length >= 0 and step >= 1, got {interval}.")
        start, length, step = interval if interval.length > 1 else (*interval[:2], 1)
        if not length:
            continue
        if found and step == found[-1].step == 1 and start == found[-1].start + found[-1].length:
            found[-1] = Interval(found[-1].start, found[-1].length + length)
        else:
            found.append(Interval(start, length, step))
    return tuple(found)


def _sorted(intervals: list[Interval]) -> tuple[Interval, ...]:
    """Return intervals that cover the same positions in ascending order."""
    if all(interval.step == 1 for interval in intervals):
        return tuple(sorted(intervals))
    positions = torch.cat([torch.arange(n) * step + start for start, n, step in intervals]).sort().values
    steps = positions.diff()
    if len(steps) == 0 or bool((steps == steps[0]).all()):
        return (Interval(int(positions[0]), len(positions), int(steps[0]) if len(steps) else 1),)
    return tuple(Interval(int(position), 1) for position in positions)


def _check_coverage(intervals: list[Interval], length: int) -> None:
    """Raise unless every position in [0, length) is in exactly one interval."""
    count = torch.zeros(length, dtype=torch.int32)
    for start, n, step in intervals:
        if start + (n - 1) * step >= length:
            raise ValueError(f"intervals must cover the positions 0 to {length - 1} once, got the position "
                             f"{start + (n - 1) * step}.")  # fmt: skip
        count[start : start + n * step : step] += 1
    if length and not bool((count == 1).all()):
        wrong = int((count != 1).nonzero()[0])
        raise ValueError(f"intervals must contain every position once, got position {wrong} {int(count[wrong])} times.")
