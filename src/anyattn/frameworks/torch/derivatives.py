"""Derivatives beyond the gradient: forward mode, and the derivatives of the backward, as autograd.Functions.

torch.library has no rule for forward mode, so the rules are methods of Functions around the operators. Second
derivatives are symmetric, so one pass, `second`, is the backward of the tangent, the backward of the backward, and the
tangent of the backward. Derivatives of third order raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...definition.inputs import GRADIENTS, Extras, Gradients, Inputs, Saved, SecondGradients, Tangents, make_inputs
from ...definition.options import Options
from ...definition.passes import BACKWARD, FORWARD_TANGENT, SECOND, TANGENT, Pass
from . import batching, fastpath, ops

THIRD = "anyattn has no third derivative, so a second derivative cannot be differentiated."
TWICE = "anyattn has no forward mode inside forward mode. Compute Hessians as jacfwd(jacrev(f)), torch.func.hessian(f)."
_SAVED, _EXTRAS = len(Saved._fields), len(Extras._fields)
_DIFFERENTIABLE = ("q", "k", "v", *GRADIENTS)


class Static(NamedTuple):
    """Arguments of a call that are not tensors. metadata: of the call's arrays, for the eager fast path."""

    options: Options
    backend: str
    lse_gradient: bool
    metadata: Any = None


def tangent(
    static: Static, inputs: Inputs, out: Tensor, lse: Tensor, given: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return (tout, tlse). given: tangents of the inputs of the forward pass, in their order; None for zeros."""
    q, k, v, extras = inputs
    tangents = _tangents(given[:3], given[3:], (q, k, v))
    arrays = (q, k, v, out, lse, *tangents, *extras)
    result: tuple[Tensor, Tensor] = AttentionTangent.apply(static, *_without_gradient(arrays, (3, 4)))
    return result


def forward_tangent(static: Static, arrays: Sequence[Any]) -> tuple[Any, Any] | None:
    """Return (out, lse) with their tangents from one call, or None, see `fastpath.unpack_tangents`.

    arrays: the inputs of the forward pass, in their order.
    """
    duals = fastpath.unpack_tangents(arrays)
    if duals is None:
        return None
    primals, given = duals
    q, k, v, *extras = primals
    tangents = _tangents(given[:3], given[3:], (q, k, v))
    out, lse, tout, tlse = AttentionForwardTangent.apply(static, q, k, v, *tangents, *extras)
    return forward_ad.make_dual(out, tout), forward_ad.make_dual(lse, tlse) if static.lse_gradient else lse


def gradients(saved: Saved, inputs: Inputs, static: Static, wants: tuple[bool, ...]) -> Gradients:
    """Return the gradients, which can be differentiated once more."""
    q, k, v, extras = inputs
    arrays = _without_gradient((q, k, v, *saved, *extras), (3, 4))
    function = AttentionGradientsWithTangents if fastpath.is_forward_mode() else AttentionGradients
    return Gradients(*function.apply(static, wants, *arrays))


def second(saved: Saved, tangents: Tangents, inputs: Inputs, static: Static) -> SecondGradients:
    """Return the gradients of <dout, tout> + <dlse, tlse>, whose derivatives raise."""
    q, k, v, extras = inputs
    return SecondGradients(*AttentionSecond.apply(static, q, k, v, *saved, *tangents, *extras))


def batched(
    pass_: Pass, info: Any, dims: Sequence[Any], static: Static, arrays: Sequence[Any], call: Callable[..., Any]
) -> tuple[Any, Any]:
    """Return the results of all samples, from one call if the samples can be its batch."""
    return batching.apply(pass_, info.batch_size, dims, arrays, call, separate=static.options.score != "")


class AttentionTangent(torch.autograd.Function):
    """Differentiable (tout, tlse) from the inputs of the tangent pass. out and lse follow from q, k and v."""

    @staticmethod
    def forward(static: Static, *arrays: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = ops.tangent(*arrays, *static.options, static.backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.static, *arrays = inputs
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dtout: Tensor | None, dtlse: Tensor | None) -> Any:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        tangents, inputs = Tangents(*rest[:-_EXTRAS]), make_inputs(q, k, v, *rest[-_EXTRAS:])
        saved = Saved(out, lse, torch.zeros_like(out) if dtout is None else dtout, dtlse)
        needs = dict(zip(TANGENT.inputs, ctx.needs_input_grad[1:], strict=True))
        found = _gradients_of_tangent(saved, tangents, inputs, ctx.static, needs)
        return None, *[found.get(name) for name in TANGENT.inputs]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(TWICE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], static: Static, *arrays: Any) -> tuple[Any, Any]:
        _, *dims = in_dims
        return batched(TANGENT, info, dims, static, arrays, lambda *xs: AttentionTangent.apply(static, *xs))


class AttentionForwardTangent(torch.autograd.Function):
    """Differentiable (out, lse, tout, tlse) from the inputs of their pass."""

    @staticmethod
    def forward(static: Static, *arrays: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = ops.forward_tangent(*arrays, *static.options, static.backend)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.static, *arrays = inputs
        out, lse, _, tlse = output
        ctx.save_for_backward(*arrays, out, lse)
        ctx.set_materialize_grads(False)
        if not ctx.static.lse_gradient:
            ctx.mark_non_differentiable(lse, tlse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dtout: Tensor | None, dtlse: Tensor | None) -> Any:
        q, k, v, *rest, out, lse = ctx.saved_tensors
        tangents, inputs = Tangents(*rest[:-_EXTRAS]), make_inputs(q, k, v, *rest[-_EXTRAS:])
        needs = dict(zip(FORWARD_TANGENT.inputs, ctx.needs_input_grad[1:], strict=True))
        parts: list[dict[str, Any]] = []
        if dout is not None or dlse is not None:
            saved = Saved(out, lse, torch.zeros_like(out) if dout is None else dout, dlse)
            grads = gradients(saved, inputs, ctx.static, tuple([needs[name] for name in GRADIENTS]))
            parts.append({name: x for name, x in zip(_DIFFERENTIABLE, grads, strict=True) if needs[name]})
        if dtout is not None or dtlse is not None:
            saved = Saved(out, lse, torch.zeros_like(out) if dtout is None else dtout, dtlse)
            parts.append(_gradients_of_tangent(saved, tangents, inputs, ctx.static, needs))
        return None, *[_sum(part.get(name) for part in parts) for name in FORWARD_TANGENT.inputs]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(TWICE)


class AttentionGradients(torch.autograd.Function):
    """Differentiable gradients from the inputs of the backward pass. out and lse follow from q, k and v."""

    @staticmethod
    def forward(static: Static, wants: tuple[bool, ...], *arrays: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = ops.backward(*arrays, *static.options, static.backend, *wants)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.static, ctx.wants, *arrays = inputs
        ctx.save_for_backward(*arrays)
        ctx.set_materialize_grads(False)
        absent = [x for x, want in zip(output, (True, True, True, *ctx.wants), strict=True) if not want]
        ctx.mark_non_differentiable(*absent)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        q, k, v, *rest = ctx.saved_tensors
        saved, inputs = Saved(*rest[:_SAVED]), make_inputs(q, k, v, *rest[_SAVED:])
        given = [x if want else None for x, want in zip(cotangents, (True, True, True, *ctx.wants), strict=True)]
        found = second(saved, Tangents(*given), inputs, ctx.static)
        ddlse = None if saved.dlse is None else found.ddlse
        return (
            None,
            None,
            found.dq,
            found.dk,
            found.dv,
            None,
            None,
            found.ddout,
            ddlse,
            *_of_extras(inputs.extras, found),
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], static: Static, wants: tuple[bool, ...], *arrays: Any
    ) -> tuple[Any, Any]:
        _, _, *dims = in_dims
        return batched(BACKWARD, info, dims, static, arrays, lambda *xs: AttentionGradients.apply(static, wants, *xs))


class AttentionGradientsWithTangents(AttentionGradients):
    """AttentionGradients under forward-mode AD. Separate because Dynamo rejects Functions that define jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        AttentionGradients.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients along the inputs (symmetry: `second`) and along dout and dlse (linear)."""
        q, k, v, *rest = ctx.saved_tensors
        saved, inputs = Saved(*rest[:_SAVED]), make_inputs(q, k, v, *rest[_SAVED:])
        _, _, tq, tk, tv, _, _, tdout, tdlse, *others = tangents
        along = _tangents((tq, tk, tv), others, (q, k, v))
        parts: list[tuple[Any, ...]] = []
        if any(x is not None for x in along):
            found = second(saved, along, inputs, ctx.static)
            parts.append(tuple(found)[: len(Gradients._fields)])
        if tdout is not None or (tdlse is not None and saved.dlse is not None):
            dout = torch.zeros_like(saved.dout) if tdout is None else tdout
            linear = Saved(saved.out, saved.lse, dout, None if saved.dlse is None else tdlse)
            parts.append(tuple(gradients(linear, inputs, ctx.static, ctx.wants)))
        wanted = (True, True, True, *ctx.wants)
        return tuple(
            sum(terms[1:], terms[0]) if want and terms else None
            for want, terms in zip(wanted, zip(*parts, strict=True) if parts else [()] * len(wanted), strict=True)
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], static: Static, wants: tuple[bool, ...], *arrays: Any
    ) -> tuple[Any, Any]:
        _, _, *dims = in_dims
        return batched(
            BACKWARD, info, dims, static, arrays, lambda *xs: AttentionGradientsWithTangents.apply(static, wants, *xs)
        )


class AttentionSecond(torch.autograd.Function):
    """Second derivatives, from the inputs of their pass. Their derivatives raise instead of being silently zero."""

    @staticmethod
    def forward(static: Static, *arrays: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = ops.second(*arrays, *static.options, static.backend)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(THIRD)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], static: Static, *arrays: Any) -> tuple[Any, Any]:
        _, *dims = in_dims
        return batched(SECOND, info, dims, static, arrays, lambda *xs: AttentionSecond.apply(static, *xs))


def _tangents(given: Sequence[Any], extras: Sequence[Any], like: Sequence[Tensor]) -> Tangents:
    """Return the tangents of all arrays, from the tangents of q, k and v and of the optional arrays.

    Raises:
        NotImplementedError: an optional array without a derivative has a tangent.
    """
    named = dict(zip(Extras._fields, extras, strict=False))
    for name, x in named.items():
        if x is not None and name not in GRADIENTS:
            raise NotImplementedError(
                f"{name} must not have a tangent, because it has no derivative. Pass it without one."
            )
    return Tangents(*given, *[named.get(name) for name in GRADIENTS])


def _gradients_of_tangent(
    saved: Saved, tangents: Tangents, inputs: Inputs, static: Static, needs: Mapping[str, bool]
) -> dict[str, Any]:
    """Return the gradients of the inputs and, if needed, of the tangents, in which the tangent is linear."""
    found = second(saved, tangents, inputs, static)
    result: dict[str, Any] = {"q": found.dq, "k": found.dk, "v": found.dv}
    result.update(zip(Extras._fields, _of_extras(inputs.extras, found), strict=True))
    if any(needs[name] for name in Tangents._fields):
        grads = gradients(saved, inputs, static, _present(inputs.extras))
        result.update({name: x for name, x in zip(Tangents._fields, grads, strict=True) if needs[name]})
    return result


def _sum(terms: Iterable[Any]) -> Any:
    """Return the sum of the terms that are not None; None without such terms."""
    given = [x for x in terms if x is not None]
    return sum(given[1:], given[0]) if given else None


def _present(extras: Extras) -> tuple[bool, ...]:
    """Return which of GRADIENTS are given."""
    return tuple([getattr(extras, name) is not None for name in GRADIENTS])


def _of_extras(extras: Extras, found: SecondGradients) -> Extras:
    """Return the gradients of the optional arrays in the order of those arrays."""
    return Extras(**{name: getattr(found, f"d{name}") for name in GRADIENTS if getattr(extras, name) is not None})


def _without_gradient(arrays: tuple[Any, ...], places: Sequence[int]) -> tuple[Any, ...]:
    """Return the arrays. Arrays at `places` follow from the others, so no gradient passes through them."""
    return tuple([x.detach() if i in places else x for i, x in enumerate(arrays)])
