"""autograd.Function of attention, and the choice between the operator and the eager fast path."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...definition.inputs import GRADIENTS, NO_EXTRAS, Extras, Gradients, Inputs, Saved, flatten, make_inputs
from ...definition.options import Options
from ...definition.passes import FORWARD
from ...runtime import dispatch, execute
from . import derivatives, fastpath, ops
from .adapter import adapter
from .derivatives import Static

Results = tuple[Tensor | None, ...]


class Attention(torch.autograd.Function):
    """Differentiable (out, lse) from a Static and the inputs of the forward pass, flat as autograd requires."""

    @staticmethod
    def forward(static: Static, *arrays: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.call_forward(make_inputs(*arrays), static.options, static.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        static, *arrays = inputs
        _save(ctx, static, arrays, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Results:
        *arrays, out, lse = ctx.saved_tensors
        static, inputs = ctx.static, make_inputs(*arrays)
        dout = torch.zeros_like(out) if dout is None else dout
        saved = Saved(out, lse, dout, dlse if static.lse_gradient else None)
        _, _, _, _, *needs = ctx.needs_input_grad  # for the optional arrays, if they were passed
        if not needs:
            grads = _gradients(saved, inputs, static, NONE_WANTED)
            return None, grads.dq, grads.dk, grads.dv
        wants = _wants(Extras(*needs))
        grads = _gradients(saved, inputs, static, wants)
        found = {name: getattr(grads, f"d{name}") for name, want in zip(GRADIENTS, wants, strict=True) if want}
        return None, grads.dq, grads.dk, grads.dv, *Extras(**found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], static: Static, *arrays: Any) -> tuple[Any, Any]:
        _, *dims = in_dims
        return derivatives.batched(FORWARD, info, dims, static, arrays, lambda *xs: Attention.apply(static, *xs))


# Dynamo counts the parameters. With only *arrays it would take the first one for the context.
_parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("static", *FORWARD.inputs)]
Attention.forward.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]


class DirectAttention(torch.autograd.Function):
    """Eager fast path: attention without the operator and setup_context. Also accepts only q, k and v."""

    @staticmethod
    def forward(ctx: Any, static: Static, *arrays: Any) -> tuple[Tensor, Tensor]:
        inputs = make_inputs(*arrays)
        out, lse = execute.forward(adapter, inputs, static.options, static.backend, static.metadata)
        _save(ctx, static, arrays, out, lse)
        return out, lse

    backward = staticmethod(Attention.backward)


def _save(ctx: Any, static: Static, arrays: Sequence[Any], out: Tensor, lse: Tensor) -> None:
    """Save the arrays and options that the backward pass needs."""
    ctx.static = static
    ctx.save_for_backward(*arrays, out, lse)
    ctx.set_materialize_grads(False)
    if not static.lse_gradient:
        ctx.mark_non_differentiable(lse)


class AttentionWithTangents(Attention):
    """Attention under forward-mode AD. Separate because Dynamo rejects Functions that define jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        static, *arrays = inputs
        _save(ctx, static, arrays, *output)
        ctx.save_for_forward(*arrays, *output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        *arrays, out, lse = ctx.saved_tensors
        _, *given = tangents
        tout, tlse = derivatives.tangent(ctx.static, make_inputs(*arrays), out, lse, given)
        return tout, tlse if ctx.static.lse_gradient else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], static: Static, *arrays: Any) -> tuple[Any, Any]:
        _, *dims = in_dims
        return derivatives.batched(
            FORWARD, info, dims, static, arrays, lambda *xs: AttentionWithTangents.apply(static, *xs)
        )


_of_gradients = operator.attrgetter(*GRADIENTS)
NONE_WANTED = tuple(False for _ in GRADIENTS)


def _wants(needs: Extras) -> tuple[bool, ...]:
    return tuple([getattr(needs, name) for name in GRADIENTS])


def _gradients(saved: Saved, inputs: Inputs, static: Static, wants: tuple[bool, ...]) -> Gradients:
    """Return the gradients, directly from the backend in plain eager execution, otherwise from the operator."""
    create_graph = torch.is_grad_enabled()  # or torch.func
    metadata = None if create_graph else fastpath.metadata(flatten(inputs, saved))
    if metadata is not None:
        absent = () if inputs.extras is NO_EXTRAS else ops.absent(wants)
        return execute.backward(adapter, saved, inputs, static.options, static.backend, metadata, absent=absent)
    if create_graph:
        plain = Static(static.options, static.backend, static.lse_gradient)
        found = derivatives.gradients(saved, inputs, plain, wants)
    else:
        found = ops.call_backward(saved, inputs, static.options, static.backend, wants)
    return found if inputs.extras.k_scale is None else without_keys(found)


def without_keys(grads: Gradients) -> Gradients:
    """Return the gradients without those of k and v, which the operator returns empty for quantised keys and values."""
    given = dict(zip(Gradients._fields, grads, strict=True))
    return Gradients(**{**given, "dk": None, "dv": None})


_direct = fastpath.base_apply(DirectAttention)


def attention(
    inputs: Inputs,
    metadata: tuple[Any, ...] | None,
    options: Options,
    lse_gradient: bool,
    backend: str,
    *,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse), differentiable in q, k, v and the arrays of GRADIENTS, and through lse on request.

    metadata: of the arrays if the eager fast path may be used; else None. want_lse: if False, lse may be None.
    """
    if metadata is not None:
        if not (torch.is_grad_enabled() and _is_differentiated(inputs)):
            return execute.forward(adapter, inputs, options, backend, metadata, want_lse=want_lse)
        # resolved now, because the backward pass may run outside this `with backend(...)`
        named = backend or ",".join(dispatch.named(None))
        out, lse = _direct(Static(options, named, lse_gradient, metadata), *flatten(inputs))
        return out, lse
    apply = fastpath.outside_graphs(_apply_with_tangents if fastpath.is_forward_mode() else Attention.apply)
    q, k, v, extras = inputs
    out, lse = apply(Static(options, backend, lse_gradient), *fastpath.distinct((q, k, v, *extras)))
    return out, lse


def _apply_with_tangents(static: Static, *arrays: Any) -> tuple[Tensor, Tensor]:
    """Return (out, lse) under forward-mode AD."""
    found = derivatives.forward_tangent(static, arrays)
    result: tuple[Tensor, Tensor] = AttentionWithTangents.apply(static, *arrays) if found is None else found
    return result


def _is_differentiated(inputs: Inputs) -> bool:
    q, k, v, extras = inputs
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return extras is not NO_EXTRAS and any(x is not None and x.requires_grad for x in _of_gradients(extras))
