"""The one autograd.Function, and the choice of the way through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...definition.problem import Options
from ...runtime import dispatch, execute
from . import batching, fastpath, ops
from .adapter import adapter


class Static(NamedTuple):
    """What a call is besides its tensors."""

    lse_gradient: bool
    backend: str
    options: Options


class Attention(torch.autograd.Function):
    """(out, lse) from the arrays of INPUTS, at top level as autograd needs them, and a Static."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sink: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        leftpad_k: Tensor | None,
        offset: Tensor | None,
        block_table: Tensor | None,
        cache_batch_idx: Tensor | None,
        rng_state: Tensor | None,
        static: Static,
    ) -> tuple[Tensor, Tensor]:
        # Dynamo counts these parameters: with *inputs it would pass a context as well
        scores = (bias, mask, alibi_slopes, sink)
        tables = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, offset, block_table, cache_batch_idx)
        out, lse = ops.forward(q, k, v, *scores, *tables, rng_state, *static.options, static.backend)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *arrays, static = inputs
        _save(ctx, arrays, static, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *arrays, out, lse = ctx.saved_tensors
        static, needs = ctx.static, ctx.needs_input_grad
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = dlse if static.lse_gradient else None
        want_dbias, want_dsink = (needs[3], needs[6]) if len(arrays) > 3 else (False, False)
        saved, tail = (out, lse, dout, dlse), (static.backend, want_dbias, want_dsink)
        create_graph = torch.is_grad_enabled()  # or torch.func
        metadata = None if create_graph else fastpath.metadata((*arrays, *saved))
        if metadata is not None:
            call = (saved, tuple(arrays), static.options, static.backend, metadata)
            grads = execute.backward(adapter, *call, want_dbias=want_dbias, want_dsink=want_dsink)
        else:
            tensors = (dout, *execute.full(tuple(arrays)), out, lse, dlse)
            if create_graph:
                grads = AttentionGradients.apply(*tensors, (*static.options, *tail))
            else:
                grads = ops.backward(*tensors, *static.options, *tail)
        dq, dk, dv, dbias, dsink = grads
        grads = (dq, dk, dv, dbias if want_dbias else None, None, None, dsink if want_dsink else None, *[None] * 11)
        return grads[: len(needs)]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.forward(
            info.batch_size, in_dims[:-1], inputs[:-1], lambda *arrays: Attention.apply(*arrays, inputs[-1])
        )


class DirectAttention(torch.autograd.Function):
    """The same by the kernel itself, without its operator and setup_context, perhaps from q, k and v alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *arrays, static, metadata = inputs
        out, lse = execute.forward(adapter, tuple(arrays), static.options, static.backend, metadata)
        _save(ctx, arrays, static, out, lse)
        return out, lse

    backward = staticmethod(Attention.backward)


def _save(ctx: Any, arrays: Sequence[Any], static: Static, out: Tensor, lse: Tensor) -> None:
    """What the backward needs."""
    ctx.static = static
    ctx.save_for_backward(*arrays, out, lse)
    ctx.set_materialize_grads(False)
    if not static.lse_gradient:
        ctx.mark_non_differentiable(lse)


class AttentionGradients(torch.autograd.Function):
    """The operator `backward`, with a derivative (a second derivative of attention) that raises instead of lying."""

    @staticmethod
    def forward(*inputs: Any) -> ops.Arrays:
        results: ops.Arrays = ops.backward(*inputs[:-1], *inputs[-1])
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: ops.Arrays) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("anyattn has no second derivative: its backward cannot be differentiated")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.backward(
            info.batch_size, in_dims[:-1], inputs[:-1], lambda *tensors: AttentionGradients.apply(*tensors, inputs[-1])
        )


class AttentionWithTangents(Attention):
    """Where tangents may be: forward mode is not built. A class apart, since Dynamo refuses any that defines jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("anyattn has no forward-mode derivative: use reverse mode (backward, torch.func.vjp)")


_direct = fastpath.base_apply(DirectAttention)


def attention(
    arrays: ops.Arrays,
    metadata: ops.Arrays | None,
    options: Options,
    lse_gradient: bool,
    backend: str,
    *,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in q, k, v, bias and sink, and through lse if asked for.

    metadata: of the arrays, where nothing watches; else None. want_lse: otherwise lse may be None.
    """
    if metadata is not None:
        if not (torch.is_grad_enabled() and _differentiated(*arrays[:7])):
            return execute.forward(adapter, arrays, options, backend, metadata, want_lse=want_lse)
        # named now: the backward may run outside this `with backend(...)`
        named = backend or ",".join(dispatch.named(None))
        out, lse = _direct(*arrays, Static(lse_gradient, named, options), metadata)
        return out, lse
    fastpath.break_inside_transforms()
    function = AttentionWithTangents if fastpath.forward_mode() else Attention
    out, lse = function.apply(*fastpath.distinct(arrays), Static(lse_gradient, backend, options))
    return out, lse


def _differentiated(
    q: Tensor, k: Tensor, v: Tensor, bias: Any = None, mask: Any = None, alibi_slopes: Any = None, sink: Any = None
) -> bool:
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sink is not None and sink.requires_grad)
    )
