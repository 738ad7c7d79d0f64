"""Exchange of keys and values, and of their gradients, between the ranks of a group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import OWN, Part, Stage, Transfer

KEYS, GRADIENTS = 1, 2  # tags: two ranks may exchange a message of each kind at a time


class Shapes(NamedTuple):
    """Shapes of k and v, (batch, rows, heads, dim), with any number of rows."""

    batch: int
    heads: int
    head_dim: int
    head_dim_v: int

    def split(self, message: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return the views of a message's keys and values."""
        border = self.batch * rows * self.heads * self.head_dim
        shape = (self.batch, rows, self.heads)
        return message[:border].view(*shape, self.head_dim), message[border:].view(*shape, self.head_dim_v)

    def size(self, rows: int) -> int:
        return self.batch * rows * self.heads * (self.head_dim + self.head_dim_v)


def shapes_of(k: Tensor, v: Tensor) -> Shapes:
    return Shapes(k.shape[0], k.shape[2], k.shape[3], v.shape[3])


class Exchange:
    """Messages in flight. Buffers stay alive until `wait`, which returns the received messages."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        tag: int,
        send: Iterable[tuple[int, Tensor]],
        receive: Iterable[tuple[int, Tensor]],
    ) -> None:
        self._sent = [(peer, x) for peer, x in send if x.numel()]
        received = list(receive)
        self._received = [x for _, x in received]
        operations = [dist.P2POp(dist.isend, x, global_rank(group, peer), group, tag) for peer, x in self._sent]
        operations += [
            dist.P2POp(dist.irecv, x, global_rank(group, peer), group, tag) for peer, x in received if x.numel()
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []
        return self._received


def global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def post_keys(group: dist.ProcessGroup | None, stage: Stage, k: Tensor, v: Tensor) -> Exchange:
    """Start the exchange of a stage's keys and values."""
    shapes = shapes_of(k, v)
    send = [(transfer.peer, _pack(transfer, k, v)) for transfer in stage.send]
    receive = [(transfer.peer, k.new_empty(shapes.size(transfer.rows))) for transfer in stage.receive]
    return Exchange(group, KEYS, send, receive)


def _pack(transfer: Transfer, k: Tensor, v: Tensor) -> Tensor:
    """Return a message with the keys and then the values of the transfer's pieces."""
    rows = [slice(piece.row, piece.row + piece.length) for piece in transfer.pieces]
    return torch.cat([torch.cat([x[:, part] for part in rows], 1).reshape(-1) for x in (k, v)])


def stage_keys(stage: Stage, messages: Sequence[Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a stage: views of what the rank has or received, if they come from one source."""
    shapes = shapes_of(k, v)
    sources = [shapes.split(x, transfer.rows) for x, transfer in zip(messages, stage.receive, strict=True)]
    sources.append((k, v))  # OWN
    found = [[sources[part.source][which][:, _rows(part)] for part in stage.parts] for which in (0, 1)]
    keys, values = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in found)
    return keys, values


def _rows(part: Part) -> slice:
    return slice(part.row, part.row + part.length)


def stages(
    group: dist.ProcessGroup | None, plan: Sequence[Stage], k: Tensor, v: Tensor
) -> Iterator[tuple[Stage, Tensor | None, Tensor | None]]:
    """Yield each stage with its keys and values (None: no keys). The next exchange runs during the stage's work."""
    pending = post_keys(group, plan[0], k, v)
    for index, stage in enumerate(plan):
        messages = pending.wait()
        if index + 1 < len(plan):
            pending = post_keys(group, plan[index + 1], k, v)
        if stage.parts:
            yield stage, *stage_keys(stage, messages, k, v)
        else:
            yield stage, None, None


class Returns:
    """Gradients of keys and values that return to the ranks that have the keys, added there in the order of stages."""

    def __init__(self, group: dist.ProcessGroup | None, dk: Tensor, dv: Tensor) -> None:
        self._group, self._dk, self._dv = group, dk, dv
        self._shapes = shapes_of(dk, dv)
        self._pending: tuple[Stage, Exchange] | None = None

    def add(self, stage: Stage, dk: Tensor | None, dv: Tensor | None) -> None:
        """Add the gradients of the stage before, which releases its buffers, and start to return those of a stage."""
        self.finish()
        self._pending = stage, Exchange(self._group, GRADIENTS, self._messages(stage, dk, dv), self._buffers(stage))

    def finish(self) -> None:
        """Add the gradients that the other ranks return."""
        if self._pending is None:
            return
        stage, exchange = self._pending
        for transfer, message in zip(stage.send, exchange.wait(), strict=True):
            dk, dv = self._shapes.split(message, transfer.rows)
            row = 0
            for piece in transfer.pieces:
                self._add(piece.row, dk[:, row : row + piece.length], dv[:, row : row + piece.length])
                row += piece.length
        self._pending = None

    def _buffers(self, stage: Stage) -> list[tuple[int, Tensor]]:
        """Return the buffers for the gradients of the keys that the rank sent."""
        size = self._shapes.size
        return [(transfer.peer, self._dk.new_empty(size(transfer.rows))) for transfer in stage.send]

    def _messages(self, stage: Stage, dk: Tensor | None, dv: Tensor | None) -> list[tuple[int, Tensor]]:
        """Return the gradients of the keys that the rank received; gradients of its own keys are added."""
        found = [(t.peer, self._dk.new_empty(self._shapes.size(t.rows))) for t in stage.receive]
        if dk is None or dv is None:
            return found
        row = 0
        for part in stage.parts:
            rows = slice(row, row + part.length)
            if part.source == OWN:
                self._add(part.row, dk[:, rows], dv[:, rows])
            else:
                target = self._shapes.split(found[part.source][1], stage.receive[part.source].rows)
                target[0][:, _rows(part)] = dk[:, rows]
                target[1][:, _rows(part)] = dv[:, rows]
            row += part.length
        return found

    def _add(self, row: int, dk: Tensor, dv: Tensor) -> None:
        self._dk[:, row : row + dk.shape[1]] += dk
        self._dv[:, row : row + dv.shape[1]] += dv
