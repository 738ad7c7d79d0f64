"""Functions of the public API for JAX arrays and tracers, in eager code and inside every transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...definition.dtypes import DTYPES
from ...definition.inputs import (
    TABLES,
    Appended,
    Gradients,
    Inputs,
    Saved,
    SecondGradients,
    Tangents,
    flatten,
    reshape_gradients,
)
from ...definition.options import Options, Rotation
from ...definition.passes import BACKWARD, FORWARD, PASSES, SECOND, TANGENT, Pass
from ...definition.problem import Problem, described
from ...definition.score.trace import trace as trace_functions
from ...runtime import dispatch
from ..score_arguments import ATTENTION, Call, ScoreFunctions, Use, with_traced
from ..score_functions import Functions, with_gradients
from ..scores import Stage
from . import arrays as conversion
from . import batching, calls, derivatives, kvcache  # noqa: F401 (rules of the primitives, and for compat.jax)
from . import scores as formulas
from .calls import Static, backends_of, check_values, find, named, problem
from .primitives import bind


def attention(
    inputs: Inputs,
    options: Options,
    seed: int | None,
    return_lse: bool,
    backend: str | None,
    *,
    want_lse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return (out, lse), both differentiable."""
    return forward(inputs, options, seed, backend)


def forward(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> tuple[jax.Array, jax.Array]:
    found = _bind(FORWARD, _prepare(inputs, options, seed), options, backend)
    return found["out"], found["lse"]


def backward(saved: Saved, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> Gradients:
    prepared = _prepare(inputs, options, seed)
    found = _bind(BACKWARD, prepared, options, backend, _checked(saved._asdict()))
    absent = dict.fromkeys(("dk", "dv"))  # quantised keys and values have no gradients
    return reshape_gradients(Gradients(**{**absent, **found}), inputs.extras)


def tangent(
    out: Any,
    lse: Any,
    tangents: Tangents,
    inputs: Inputs,
    options: Options,
    seed: int | None,
    backend: str | None,
) -> tuple[jax.Array, jax.Array]:
    prepared = _prepare(inputs, options, seed)
    given = _checked({"out": out, "lse": lse}) | _along(tangents)
    found = _bind(TANGENT, prepared, options, backend, given)
    return found["tout"], found["tlse"]


def forward_tangent(
    tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return (out, lse, tout, tlse) of the two passes, because each of them has rules of differentiation."""
    prepared = _prepare(inputs, options, seed)
    found = _bind(FORWARD, prepared, options, backend)
    along = _bind(TANGENT, prepared, options, backend, found | _along(tangents))
    return found["out"], found["lse"], along["tout"], along["tlse"]


def second(
    saved: Saved, tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> SecondGradients:
    prepared = _prepare(inputs, options, seed)
    found = _bind(SECOND, prepared, options, backend, _checked(saved._asdict()) | _along(tangents))
    absent = dict.fromkeys(SecondGradients._fields)
    return reshape_gradients(SecondGradients(**{**absent, **found}), inputs.extras)


def append(
    arrays: Appended, rotation: Rotation, backend: str | None, *, check: Callable[[Any], None]
) -> tuple[jax.Array, Any]:
    """Return q and the keys in use; new keys are refused, because JAX arrays cannot be changed in place."""
    q, lengths = conversion.check("q", arrays.q), arrays.cache_seqlens
    if arrays.new_k is not None or arrays.new_v is not None or arrays.rotary_cos is not None:
        raise TypeError(
            "k, v and rotary_cos must be None for JAX arrays, which cannot be changed in place. "
            "Call anyattn.compat.jax.attention_with_kvcache, which returns the new caches too."
        )
    batch = q.shape[0] if q.ndim else 0
    return q, None if lengths is None else conversion.per_sequence("cache_seqlens", lengths, batch)


def check(inputs: Inputs, options: Options, backend: str | None) -> None:
    _find(_prepare(inputs, options, None), options, backend)


def explain(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> dispatch.Explanation:
    from ...definition.validate import make_problem

    prepared = _prepare(inputs, options, seed)
    static, given = _static(prepared, options, backend)
    metadata = {name: conversion.describe(name, x.shape, x.dtype) for name, x in zip(static.names, given, strict=True)}
    return dispatch.explain(make_problem(metadata, options), dispatch.named(backend) or backends_of(static))


def warmup(inputs: Inputs, options: Options, seed: int | None, backend: str | None, *, backward: bool) -> None:
    _find(_prepare(inputs, options, seed), options, backend).plan.warmup()


def scores(inputs: Inputs, options: Options, queries: Any, stage: Stage, lse: Any = None) -> jax.Array:
    prepared = _prepare(inputs, options, None)
    static, given = _static(prepared, options, None)
    _check_known(problem(static, given), dict(zip(static.names, given, strict=True)))
    return formulas.scores(prepared, options, queries, stage, lse)


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[jax.Array, jax.Array]:
    """Merge two results, differentiable in all four arrays; see explicit.merge."""
    for name, x in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(x, jax.Array):
            raise TypeError(f"{name} must be a JAX array like out_a, got {type(x).__name__}.")
    top = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.exp(lse_a - safe) + jnp.exp(lse_b - safe)
    some = jnp.where(total > 0, total, 1.0)  # without keys in either set: no NaN in results and gradients
    lse = jnp.where(total > 0, safe + jnp.log(some), -jnp.inf)
    weight = jnp.swapaxes(jnp.exp(lse_b - safe) / some, -1, -2)[..., None]
    a, b = out_a.astype(lse.dtype), out_b.astype(lse.dtype)
    return (a + weight * (b - a)).astype(out_a.dtype), lse


def _prepare(inputs: Inputs, options: Options, seed: int | None) -> Inputs:
    return conversion.prepare(inputs, seed, dropout=options.dropout_p > 0)


def _bind(
    pass_: Pass,
    inputs: Inputs,
    options: Options,
    backend: str | None,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the results of a pass by name. The values of tables that are known now are checked now."""
    _find(inputs, options, backend)
    given = {**dict(zip(FORWARD.inputs, flatten(inputs), strict=False)), **(others or {})}
    return bind(pass_, [given.get(name) for name in pass_.inputs], options, backend)


def _find(inputs: Inputs, options: Options, backend: str | None) -> dispatch.Ready:
    static, given = _static(inputs, options, backend)
    ready = find(static, given)
    _check_known(ready.problem, dict(zip(static.names, given, strict=True)))
    return ready


def _static(inputs: Inputs, options: Options, backend: str | None) -> tuple[Static, list[Any]]:
    given = described(FORWARD.inputs, flatten(inputs), lambda x: x)
    return Static(FORWARD.name, tuple(given), options, named(backend)), list(given.values())


def _check_known(call: Problem, given: Mapping[str, Any]) -> None:
    """Check the values of tables if all of them are known now. Otherwise the program checks them."""
    tables = {name: given[name] for name in (*TABLES, "captured_indices", "k_scale", "v_scale") if name in given}
    if (tables or call.score) and all(conversion.is_concrete(x) for x in tables.values()):
        check_values(call, {name: np.asarray(x) for name, x in tables.items()})


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: conversion.check(name, x) for name, x in given.items() if x is not None}


def _along(tangents: Tangents) -> dict[str, Any]:
    found = _checked(tangents._asdict())
    bias = found.get("tbias")
    if bias is not None and bias.ndim < 4:
        found["tbias"] = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    return found


def attention_with_functions(
    inputs: Inputs, options: Options, functions: ScoreFunctions, seed: int | None, return_lse: bool, backend: str | None
) -> tuple[Any, Any]:
    call = with_functions(inputs, options, *functions, ATTENTION)
    return call.results(*attention(call.inputs, call.options, seed, return_lse, backend))


def with_functions(inputs: Inputs, options: Options, score_mod: Any, mask_mod: Any, use: Use) -> Call:
    """Return a call with score_mod and mask_mod, differentiable in the arrays that they read.

    An array whose values are known now is a constant of every transformation.
    """
    known = DTYPES.get(conversion.check("q", inputs.q).dtype.name)
    compute = known.compute if known and known.compute else "float32"

    def convert(x: Any, floats: bool) -> Any:
        return jnp.asarray(x, compute) if floats else jnp.asarray(x)

    def join(arrays: Sequence[Any], floats: bool) -> jax.Array:
        if floats:
            return jnp.concatenate([convert(x, True).reshape(-1) for x in arrays])
        return jnp.concatenate([conversion.integers("a captured array", x).reshape(-1) for x in arrays])

    try:
        traced = trace_functions(score_mod, mask_mod, dtypes={})  # jax.numpy takes no symbols, whatever their dtype
        if not use.captured_gradients:
            traced = with_gradients(traced, lambda x: not conversion.is_concrete(x))
        functions = Functions(*traced, join, convert, lambda x: np.asarray(x) if conversion.is_concrete(x) else None)
        return with_traced(functions, inputs, options, use)
    except (IndexError, TypeError) as error:  # JAX's own errors do not name the remedy
        for sign, text in _REFUSED_BY_JAX.items():
            if sign in str(error):
                raise TypeError(text) from error
        raise


_REFUSED_BY_JAX = {
    "<traced ": "a JAX array must be wrapped to be read at traced indices. Write anyattn.captured(array)[...].",
    "anyattn.definition.score.symbol": (
        "a score function must call functions of numpy, because those of jax.numpy take no traced values. "
        "Write numpy.tanh instead of jax.numpy.tanh, for example."
    ),
}


def custom_calls() -> list[str]:
    """Register the handlers of XLA's custom calls for every pass; return the names of their targets."""
    return [calls.register(pass_.name) for pass_ in PASSES]
