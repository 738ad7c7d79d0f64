"""Attention over the keys of all ranks, stage by stage, as one autograd.Function.

Forward: each pair's (out, lse) is merged into the rank's results in the compute dtype. Backward: the probabilities of a
pair follow from the lse over all keys, so pairs are independent; the gradients of received keys return to their rank.
A sink is one more logit of every query without a value. It is joined at the end:

    lse' = log(exp(lse) + exp(sink))      out' = out exp(lse - lse')
    dsink = - sum exp(sink - lse') (<dout, out'> - dlse)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..definition.inputs import Gradients, Saved
from . import partial, transfers
from .pairs import Pair
from .partial import Arrays, Static, scores_view
from .plan import Plan


class Ring(NamedTuple):
    """Group, plan and constants of a call."""

    group: dist.ProcessGroup | None
    plan: Plan
    static: Static
    lse_gradient: bool


class Attention(torch.autograd.Function):
    """Differentiable (out, lse) of a rank's queries over the keys of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, ring: Ring, arrays: Arrays, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
        sink: Tensor | None, captured: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        arrays = arrays._replace(bias=bias, captured=captured)
        out, lse = _forward(ring, arrays, q, k, v)
        if sink is not None:
            whole = torch.logaddexp(lse, sink[:, None])
            if arrays.used is not None:
                whole = torch.where(arrays.used[:, None], whole, -torch.inf)
            out *= _rows(torch.where(lse == -torch.inf, 0.0, torch.exp(lse - whole)))
            lse = whole
        out = out.to(q.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, sink, out, lse, *arrays)
        ctx.set_materialize_grads(False)
        if not ring.lse_gradient:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        # Autograd records a backward pass only for create_graph=True. once_differentiable would not raise for a dout
        # without a gradient, and the second derivative would lack the term of attention.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph must be False for anyattn.distributed, which has no second derivatives, got True. "
                "Use one process."
            )
        q, k, v, sink, out, lse, *rest = ctx.saved_tensors
        arrays = Arrays(*rest)
        dout = torch.zeros_like(out) if dout is None else dout
        saved = Saved(out, lse, dout, dlse if ctx.ring.lse_gradient else None)
        grads = backward(ctx.ring, arrays, q, k, v, saved)
        given = (q, k, v, arrays.bias), (grads.dq, grads.dk, grads.dv, grads.dbias)
        rounded = [None if x is None else gradient.to(x.dtype) for x, gradient in zip(*given, strict=True)]
        return None, None, *rounded, None if sink is None else sink_gradient(sink, saved), grads.dcaptured


attend: Callable[..., tuple[Tensor, Tensor]] = Attention.apply


def _forward(ring: Ring, arrays: Arrays, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) without the sink, in the compute dtype."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    batch, rows, nheads, _ = q.shape
    out = q.new_zeros((batch, rows, nheads, v.shape[3]), dtype=wide)
    lse = q.new_full((batch, nheads, rows), -torch.inf, dtype=wide)
    for stage, keys, values in transfers.stages(ring.group, ring.plan.stages, k, v):
        for pair in stage.pairs:
            assert keys is not None and values is not None
            part = slice(pair.queries.row, pair.queries.row + pair.queries.length)
            merge(out[:, part], lse[..., part], *partial.forward(ring.static, pair, q, keys, values, arrays))
    return out, lse


def merge(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """Add a result over other keys to (out, lse), in place; `anyattn.merge` has the formula."""
    both = torch.logaddexp(lse, lse_part)
    weight = torch.where(lse_part == -torch.inf, 0.0, torch.exp(lse_part - both))
    out.lerp_(out_part, _rows(weight).expand_as(out))
    lse.copy_(both)


def _rows(x: Tensor) -> Tensor:
    """Return (batch, nheads, rows) as (batch, rows, nheads, 1)."""
    return x.transpose(1, 2).unsqueeze(-1)


def backward(ring: Ring, arrays: Arrays, q: Tensor, k: Tensor, v: Tensor, saved: Saved) -> Gradients:
    """Return the gradients of the rank's arrays without the sink, in the compute dtype."""
    wide = saved.lse.dtype
    dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))
    shared = arrays.bias, arrays.captured
    dbias, dcaptured = (None if x is None else x.new_zeros(x.shape, dtype=wide) for x in shared)
    returns = transfers.Returns(ring.group, dk, dv)
    for stage, keys, values in transfers.stages(ring.group, ring.plan.stages, k, v):
        if keys is None or values is None:
            returns.add(stage, None, None)
            continue
        dkeys, dvalues = (x.new_zeros(x.shape, dtype=wide) for x in (keys, values))
        for pair in stage.pairs:
            grads = partial.backward(ring.static, pair, q, keys, values, arrays, saved)
            rows, columns = (slice(piece.row, piece.row + piece.length) for piece in (pair.queries, pair.keys))
            dq[:, rows] += grads.dq
            dkeys[:, columns] += grads.dk
            dvalues[:, columns] += grads.dv
            if dbias is not None:
                _add_bias(dbias, pair, grads.dbias)
            if dcaptured is not None:
                dcaptured += grads.dcaptured
            del grads  # before buffers for messages are allocated
        returns.add(stage, dkeys, dvalues)
    returns.finish()
    return Gradients(dq, dk, dv, dbias, None, dcaptured)


def _add_bias(dbias: Tensor, pair: Pair, gradient: Tensor) -> None:
    keys = pair.keys
    rows = slice(pair.queries.row, pair.queries.row + pair.queries.length)
    target = scores_view(dbias, rows, slice(keys.start, keys.start + keys.length * keys.step, keys.step))
    target += gradient


def sink_gradient(sink: Tensor, saved: Saved) -> Tensor:
    """Return the rank's own contribution to the gradient of the sink."""
    delta = (saved.dout.to(saved.lse.dtype) * saved.out.to(saved.lse.dtype)).sum(-1).transpose(1, 2)
    if saved.dlse is not None:
        delta = delta - saved.dlse
    absent = (sink == -torch.inf)[:, None] | (saved.lse == -torch.inf)
    weight = torch.where(absent, 0.0, torch.exp(sink[:, None] - saved.lse))
    gradient: Tensor = -(weight * delta).sum((0, 2))
    return gradient
