"""Exchange of sequence parts for groups of heads (DeepSpeed-Ulysses), differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .sharding import Interval


class Exchange(NamedTuple):
    """Rows of every rank of the group, as intervals of positions, and the ascending intervals of all of them."""

    group: dist.ProcessGroup
    rank: int
    intervals: tuple[tuple[Interval, ...], ...]
    union: tuple[Interval, ...]

    def rows(self, rank: int) -> Tensor:
        """Return the rows of the union that a rank has, in the order of the rank's rows."""
        return torch.searchsorted(_positions(self.union), _positions(self.intervals[rank]))


def _positions(intervals: Sequence[Interval]) -> Tensor:
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(torch.arange(n) * step + start for start, n, step in intervals)])


class ToHeads(torch.autograd.Function):
    """(batch, own rows, heads, ...) on every rank -> (batch, all rows, own heads, ...)."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        return to_heads(exchange, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, to_rows(ctx.exchange, gradient)


class ToRows(torch.autograd.Function):
    """(batch, all rows, own heads, ...) on every rank -> (batch, own rows, heads, ...)."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        return to_rows(exchange, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, to_heads(ctx.exchange, gradient)


_apply_to_heads: Callable[[Exchange, Tensor], Tensor] = ToHeads.apply
_apply_to_rows: Callable[[Exchange, Tensor], Tensor] = ToRows.apply


def exchange_for_heads(exchange: Exchange, x: Tensor, axis: int = 1) -> Tensor:
    """Return all rows of the group for the rank's heads. axis: of the rows; the other one of axes 1, 2 is the heads."""
    return _apply_to_heads(exchange, x) if axis == 1 else _apply_to_heads(exchange, x.transpose(1, 2)).transpose(1, 2)


def exchange_for_rows(exchange: Exchange, x: Tensor, axis: int = 1) -> Tensor:
    """Return the rank's rows for all heads."""
    return _apply_to_rows(exchange, x) if axis == 1 else _apply_to_rows(exchange, x.transpose(1, 2)).transpose(1, 2)


def to_heads(exchange: Exchange, x: Tensor) -> Tensor:
    size = len(exchange.intervals)
    heads = x.shape[2] // size
    sent = [x[:, :, rank * heads : (rank + 1) * heads] for rank in range(size)]
    lengths = [sum(interval.length for interval in rank) for rank in exchange.intervals]
    shapes = [(x.shape[0], length, heads, *x.shape[3:]) for length in lengths]
    whole = x.new_empty((x.shape[0], sum(lengths), heads, *x.shape[3:]))
    for rank, part in enumerate(_all_to_all(exchange.group, sent, shapes)):
        whole[:, exchange.rows(rank).to(x.device)] = part
    return whole


def to_rows(exchange: Exchange, x: Tensor) -> Tensor:
    size = len(exchange.intervals)
    rows = [exchange.rows(rank).to(x.device) for rank in range(size)]
    sent = [x[:, own] for own in rows]
    shapes = [(x.shape[0], len(rows[exchange.rank]), *x.shape[2:])] * size
    return torch.cat(_all_to_all(exchange.group, sent, shapes), 2)


def _all_to_all(group: dist.ProcessGroup, sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return what every rank of the group sent to this one."""
    flat = torch.cat([x.reshape(-1) for x in sent])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [x.numel() for x in sent], group=group)
    return [part.view(shape) for part, shape in zip(torch.split(received, sizes), shapes, strict=True)]
