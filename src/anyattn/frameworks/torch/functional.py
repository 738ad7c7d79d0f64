"""Functions of the public API for torch tensors: arguments in canonical form, then autograd.

torch.compile traces this module. It reads metadata, never values, and does not log.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...definition.inputs import (
    CAPTURED,
    FIELDS,
    HEADS,
    NO_EXTRAS,
    SCALES,
    SCORES,
    STATE,
    TABLE,
    Appended,
    Extras,
    Gradients,
    Inputs,
    Saved,
    SecondGradients,
    Tangents,
    flatten,
    replace_extras,
    reshape_gradients,
)
from ...definition.kvcache import LABELS
from ...definition.options import Options, Rotation
from ...runtime import dispatch, execute
from ..score_arguments import ATTENTION, Call, ScoreFunctions, Use
from ..scores import Stage
from . import autograd, fastpath, kvcache, ops, score_operator
from . import scores as torch_scores
from .adapter import adapter
from .kinds import dense


def attention(
    inputs: Inputs,
    options: Options,
    seed: int | None,
    return_lse: bool,
    backend: str | None,
    *,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) with autograd. Without seed and rng_state, the dropout state is sampled from torch's generator.

    With return_lse, gradients flow through lse. want_lse requests only its values. With neither, lse may be None.
    """
    metadata = None
    if seed is None and not options.dropout_p and not fastpath.may_autocast() and inputs.extras is NO_EXTRAS:
        q, k, v, _ = inputs
        if k is not None and v is not None:
            metadata = fastpath.metadata((q, k, v))  # the most common call needs no other preparation
    if metadata is None:
        inputs = prepare(inputs, seed, draw=options.dropout_p != 0)
        metadata = fastpath.metadata(flatten(inputs))
    return autograd.attention(inputs, metadata, options, return_lse, backend or "", want_lse=want_lse or return_lse)


def forward(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return (out, lse) without autograd."""
    prepared = detach(prepare(inputs, seed))
    metadata = fastpath.metadata(flatten(prepared))
    if metadata is not None:
        return execute.forward(adapter, prepared, options, backend, metadata)
    return ops.call_forward(prepared, options, backend or "")


def backward(saved: Saved, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> Gradients:
    """Return the gradients. The gradient of a bias has the shape in which the bias was passed."""
    prepared = detach(prepare(inputs, seed))
    out, lse, dout, dlse = saved
    dlse = None if dlse is None else dense("dlse", dlse).detach()
    saved = Saved(dense("out", out).detach(), dense("lse", lse).detach(), dense("dout", dout).detach(), dlse)
    metadata = fastpath.metadata(flatten(prepared, saved))
    if metadata is not None:
        grads = execute.backward(adapter, saved, prepared, options, backend, metadata)
    else:
        grads = ops.call_backward(saved, prepared, options, backend or "")
        grads = grads if prepared.extras.k_scale is None else autograd.without_keys(grads)
    return reshape_gradients(grads, inputs.extras)


def tangent(
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    inputs: Inputs,
    options: Options,
    seed: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Return (tout, tlse) without autograd."""
    prepared = detach(prepare(inputs, seed))
    saved = dense("out", out).detach(), dense("lse", lse).detach()
    return ops.call_tangent(*saved, _tangents(tangents), prepared, options, backend or "")


def forward_tangent(
    tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (out, lse, tout, tlse) without autograd."""
    prepared = detach(prepare(inputs, seed))
    return ops.call_forward_tangent(_tangents(tangents), prepared, options, backend or "")


def second(
    saved: Saved, tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> SecondGradients:
    """Return the second derivatives. The derivative of a bias has the shape in which the bias was passed."""
    prepared = detach(prepare(inputs, seed))
    found = {name: None if x is None else dense(name, x).detach() for name, x in saved._asdict().items()}
    grads = ops.call_second(Saved(**found), _tangents(tangents), prepared, options, backend or "")
    return reshape_gradients(grads, inputs.extras)


def _tangents(tangents: Tangents) -> Tangents:
    """Return the tangents as the operators take them, without their history of gradients."""
    found = {name: None if x is None else dense(name, x).detach() for name, x in tangents._asdict().items()}
    bias = found["tbias"]
    if bias is not None and bias.ndim < 4:
        found["tbias"] = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))
    return Tangents(**found)


def explain(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> dispatch.Explanation:
    return execute.explain(adapter, ops.contiguous_inputs(prepare(inputs, seed)), options, backend)


def warmup(inputs: Inputs, options: Options, seed: int | None, backend: str | None, *, backward: bool) -> None:
    execute.warmup(adapter, ops.contiguous_inputs(prepare(inputs, seed)), options, backend, backward=backward)


def check(inputs: Inputs, options: Options, backend: str | None) -> None:
    execute.check(adapter, ops.contiguous_inputs(prepare(inputs, None)), options, backend)


def append(
    arrays: Appended, rotation: Rotation, backend: str | None, *, check: Callable[[Tensor | None], None]
) -> tuple[Tensor, Tensor | None]:
    """Append to the cache in place; return q (rotated) and the keys in use per sequence (None: all)."""
    q, lengths = dense("q", arrays.q), arrays.cache_seqlens
    if lengths is not None:
        lengths = per_sequence("cache_seqlens", lengths, q.shape[0] if q.ndim else 0, q.device)
    if arrays.new_k is None:
        if arrays.new_v is not None or arrays.rotary_cos is not None:
            raise ValueError("k must be passed together with v and rotary_cos, got None.")
        return q, lengths
    given: dict[str, Any] = {
        name: None if x is None else dense(LABELS.get(name, name), x)
        for name, x in zip(Appended._fields, arrays, strict=True)
        if name != "cache_seqlens"
    }
    given["cache_seqlens"] = lengths
    for name in ("block_table", "cache_batch_idx"):
        given[name] = None if given[name] is None else table(name, given[name])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given.values()):
        raise ValueError(
            "q, k, v and the caches must not require a gradient, because none flows through a KV cache. "
            "Append under torch.no_grad(), or detach them."
        )
    low = _autocast_dtype(q)
    if low is not None:
        low = low if given["k_scale"] is not None else given["k"].dtype  # the dtype of the cache is fixed
        for name in ("q", "new_k", "new_v"):
            given[name] = given[name].to(low) if given[name].dtype in _CASTABLE else given[name]
    used = None if lengths is None else lengths + sum(given["new_k"].shape[1:2])  # a wrong rank is reported later
    return kvcache.append(Appended(**given), rotation, backend, check=lambda: check(used)), used


def scores(inputs: Inputs, options: Options, queries: Any, stage: Stage, lse: Any = None) -> Tensor:
    """Return a stage of the scores, differentiable in q, k, bias and lse. Autocast decides the dtype of the result."""
    prepared, lse = prepare(inputs, None), None if lse is None else dense("lse", lse)
    if _autocast_dtype(prepared.q) is None:
        return torch_scores.scores(prepared, options, queries, stage, lse)
    with torch.autocast(prepared.q.device.type, enabled=False):  # products are computed in the compute dtype
        return torch_scores.scores(prepared, options, queries, stage, lse)


def attention_with_functions(
    inputs: Inputs, options: Options, functions: ScoreFunctions, seed: int | None, return_lse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) with (score_mod, mask_mod), with autograd; see Framework.attention_with_functions."""
    if torch.compiler.is_dynamo_compiling():
        prepared = prepare(inputs, seed, draw=options.dropout_p != 0)
        return score_operator.attention(_OPERATOR, prepared, options, functions, return_lse, backend)
    call = with_functions(inputs, options, *functions, ATTENTION)
    return call.results(*attention(call.inputs, call.options, seed, return_lse, backend))


def _outside_dynamo(
    inputs: Inputs, options: Options, functions: ScoreFunctions, return_lse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of prepared inputs with (score_mod, mask_mod)."""
    call = with_functions(inputs, options, *functions, ATTENTION)
    return call.results(*attention(call.inputs, call.options, None, return_lse, backend, want_lse=True))


_OPERATOR = score_operator.Operator(_outside_dynamo)


def with_functions(inputs: Inputs, options: Options, score_mod: Any, mask_mod: Any, use: Use) -> Call:
    """Return a call with score_mod and mask_mod; see Framework.with_functions."""
    from . import score_functions

    found: Call = score_functions.with_functions(inputs, options, score_mod, mask_mod, use)
    return found


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two results, differentiable in all four arrays; see explicit.merge."""
    out_a, out_b = dense("out_a", out_a), dense("out_b", out_b)
    lse_a, lse_b = dense("lse_a", lse_a), dense("lse_b", lse_b)
    top = torch.maximum(lse_a, lse_b).detach()
    safe = torch.where(torch.isfinite(top), top, 0.0)
    total = torch.exp(lse_a - safe) + torch.exp(lse_b - safe)
    some = torch.where(total > 0, total, 1.0)  # without keys in either set: no NaN in results and gradients
    lse = torch.where(total > 0, safe + torch.log(some), -torch.inf)
    weight = (torch.exp(lse_b - safe) / some).transpose(-1, -2).unsqueeze(-1)
    a, b = out_a.to(lse.dtype), out_b.to(lse.dtype)
    return (a + weight * (b - a)).to(out_a.dtype), lse


def prepare(inputs: Inputs, seed: int | None, *, draw: bool = False) -> Inputs:
    """Return the arrays in the form that the operators take.

    Conversions happen outside the autograd.Function, so that gradients pass through them. draw: a dropout state is
    needed.
    """
    q, k, v, extras = inputs
    q, k, v = dense("q", q), dense("k", k), dense("v", v)
    low = _autocast_dtype(q)
    if low is not None:
        q, k, v = (x.to(low) if x.dtype in _CASTABLE else x for x in (q, k, v))
    if extras.k_scale is not None:
        _check_stored(k, v)
    changes: dict[str, Any] = {}
    for (name, fit), x in zip(_FITS, extras):  # noqa: B905 (a keyword takes time in every call)
        if x is not None:
            fitting = fit(name, x, q, extras.cu_seqlens_q)
            if fitting is not x:
                changes[name] = fitting
    if changes:
        extras = replace_extras(extras, **changes)
    if low is not None:
        extras = _cast_scores(extras, low)
    if seed is not None or draw:
        extras = replace_extras(extras, rng_state=random_state(q, seed, extras.rng_state))
    return Inputs(q, k, v, extras)


def _check_stored(k: Tensor, v: Tensor) -> None:
    """Raise if quantised keys or values require a gradient."""
    for name, x in (("k", k), ("v", v)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient if it is quantised. Pass {name}.detach().")


def _cast_scores(extras: Extras, low: torch.dtype) -> Extras:
    """Return the extras in the dtype that autocast requires. float32 scores are accepted with any dtype."""
    cast = {}
    for name, x in zip(Extras._fields, extras, strict=True):
        if FIELDS[name].kind == SCORES and x is not None and x.dtype in _CASTABLE - {torch.float32}:
            cast[name] = x.to(low)
    return replace_extras(extras, **cast)


_CASTABLE = frozenset((torch.float32, torch.float16, torch.bfloat16))


def _autocast_dtype(q: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast requires, or None if autocast is off."""
    if not fastpath.may_autocast():
        return None
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _prepare_scores(name: str, array: Any, q: Tensor, cu_seqlens_q: Any) -> Tensor:
    """Return a view with four dimensions."""
    x = dense(name, array)
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape)) if x.ndim < 4 else x


def _prepare_heads(name: str, array: Any, q: Tensor, cu_seqlens_q: Any) -> Tensor:
    x = dense(name, array)
    wanted = ops.compute_dtype(q)
    if x.dtype is not wanted:
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}.")
        x = x.to(wanted)
    x = x.contiguous()
    if not FIELDS[name].gradient and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient here. Pass {name}.detach().")
    return x


def _prepare_table(name: str, array: Any, q: Tensor, cu_seqlens_q: Any) -> Tensor:
    if not FIELDS[name].scalar:
        return table(name, array)
    batch = q.shape[0] if cu_seqlens_q is None else dense("cu_seqlens_q", cu_seqlens_q).shape[0] - 1
    return per_sequence(name, array, batch, q.device)


def _prepare_state(name: str, array: Any, q: Tensor, cu_seqlens_q: Any) -> Tensor:
    return dense(name, array).contiguous()


def _prepare_scales(name: str, array: Any, q: Tensor, cu_seqlens_q: Any) -> Tensor:
    """Return float32. A number is accepted for all heads."""
    if isinstance(array, (int, float, np.floating)):
        return torch.full((1,), float(array), dtype=torch.float32, device=q.device)[0]
    x = dense(name, array)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}.")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient here. Pass {name}.detach().")
    return x.to(torch.float32)


_PREPARE = {
    SCORES: _prepare_scores,
    HEADS: _prepare_heads,
    TABLE: _prepare_table,
    STATE: _prepare_state,
    CAPTURED: _prepare_state,
    SCALES: _prepare_scales,
}
_FITS = tuple((name, _PREPARE[field.kind]) for name, field in FIELDS.items())  # in the order of Extras


def per_sequence(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """Return an int32 table from a table, or from one integer (Python, NumPy or tensor) for every sequence."""
    if not isinstance(value, (int, np.integer, torch.SymInt)):
        found = table(name, value)
        return found if found.ndim else found.expand(batch).contiguous()
    number: Any = value
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name} must fit in int32, got {number}.")
    return torch.full((batch,), number, dtype=torch.int32, device=device)


def table(name: str, array: Any) -> Tensor:
    """Return a contiguous int32 tensor. Other integer dtypes are converted."""
    x = dense(name, array)
    if x.dtype is torch.int32:
        return x.contiguous()
    if x.is_floating_point() or x.is_complex() or x.dtype is torch.bool:
        raise TypeError(f"{name} must hold integers, got {x.dtype}.")
    if x.device.type == "cpu" and x.dtype is torch.int64 and fastpath.can_skip_operator((x,)) and x.numel():
        low, high = (int(bound) for bound in x.aminmax())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} must fit in int32, got {low} to {high}.")
    return x.to(torch.int32).contiguous()


def random_state(q: Tensor, seed: int | None = None, rng_state: Any = None) -> Tensor:
    """Return int64 (seed, offset) on q's device, sampled from torch's generator if neither is given."""
    if rng_state is not None:
        if seed is not None:
            raise ValueError("seed cannot be combined with rng_state, which is (seed, offset).")
        return dense("rng_state", rng_state).contiguous()
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=q.device)
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {seed!r}.") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be a 64-bit integer, got {number}.")
    number = number - 2**64 if number >= 2**63 else number
    # only kernels and no copy from the host, so that a CUDA graph can capture this
    return torch.nn.functional.pad(torch.full((1,), number, dtype=torch.int64, device=q.device), (0, 1))


def detach(inputs: Inputs) -> Inputs:
    """Return the inputs detached from the autograd graph."""
    q, k, v, extras = inputs
    if extras is not NO_EXTRAS:
        extras = Extras(*[None if x is None else x.detach() for x in extras])
    return Inputs(q.detach(), k.detach(), v.detach(), extras)
