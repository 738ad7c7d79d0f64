"""Rules of differentiation: forward mode for every pass, and the transposes that reverse mode is made of.

    forward:   its tangent is the tangent pass
    tangent:   its transpose is the backward pass; along q, k and v it changes by `curvature`, whose transpose is second
    backward:  its tangent along q, k and v is the second pass, and along dout the backward pass itself
    second:    symmetric, so it is its own transpose

out and lse follow from the other inputs, so their tangents are not read. Derivatives of third order raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.interpreters import ad

from ...definition.inputs import GRADIENTS, Extras
from ...definition.passes import BACKWARD, FORWARD_TANGENT, SECOND, TANGENT, Pass
from .arrays import is_concrete
from .calls import Static, results
from .curvature import ORDER, change
from .primitives import PRIMITIVES, bind, bind_static

DIFFERENTIABLE = ("q", "k", "v", *GRADIENTS)
Named = dict[str, Any]


def _split(static: Static, values: Sequence[Any]) -> Named:
    """Return the values by the names of the operands, without symbolic zeros."""
    pairs = zip(static.names, values, strict=True)
    return {name: x for name, x in pairs if not isinstance(x, ad.Zero)}


def _tangents(tangents: Mapping[str, Any]) -> Named:
    """Return the tangents of the inputs of attention under their names in the tangent pass.

    Raises:
        ValueError: an array without a derivative has a tangent.
    """
    for name in tangents:
        if name in Extras._fields and name not in GRADIENTS:
            raise ValueError(
                f"{name} must not be differentiated, because it has no derivative. Pass jax.lax.stop_gradient({name})."
            )
    return {f"t{name}": tangents[name] for name in DIFFERENTIABLE if name in tangents}


def _call(pass_: Pass, given: Named, static: Static, absent: Sequence[str] = ()) -> Named:
    return bind(pass_, [given.get(name) for name in pass_.inputs], static.options, static.backend, absent)


def _in_order(static: Static, arrays: Sequence[Any], found: Mapping[str, Any]) -> list[Any]:
    """Return one tangent for each result of a call; a symbolic zero for those that are not found."""
    return [
        found[one.name] if one.name in found else ad.Zero(ad_type(one.shape, one.dtype))
        for one in results(static, arrays)
    ]


def ad_type(shape: tuple[int, ...], dtype: str) -> Any:
    return ShapedArray(shape, jnp.dtype(dtype))


def _forward_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, static: Static) -> Any:
    """Compute a forward pass and its tangent, in one call if all values are known.

    A program that is being traced may need the forward pass alone: `linearize`, `grad`, and the partial evaluation of a
    loop, a checkpoint or a jitted function.
    """
    given, along = dict(zip(static.names, primals, strict=True)), _tangents(_split(static, tangents))
    if all(is_concrete(x) for x in (*primals, *along.values())):
        together = _call(FORWARD_TANGENT, given | along, static)
        return [together["out"], together["lse"]], [together["tout"], together["tlse"]]
    found = bind_static(static, list(primals))
    tangent = _call(TANGENT, given | found | along, static)
    return list(found.values()), [tangent["tout"], tangent["tlse"]]


def _tangent_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, static: Static) -> Any:
    """Differentiate a tangent along its tangents, in which it is linear, and along the inputs."""
    given, along = dict(zip(static.names, primals, strict=True)), _split(static, tangents)
    found = bind_static(static, list(primals))
    inputs = _tangents({name: x for name, x in along.items() if not _is_tangent(name) and name not in ("out", "lse")})
    parts = [change(static, given, inputs)] if inputs else []
    if any(_is_tangent(name) for name in along):
        parts.append(list(bind_static(static, _linear_part(static, given, along)).values()))
    return list(found.values()), [sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)]


def _second_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, static: Static) -> Any:
    given, along = dict(zip(static.names, primals, strict=True)), _split(static, tangents)
    if not all(_is_tangent(name) for name in along):
        raise NotImplementedError(ORDER)
    found = bind_static(static, list(primals))
    return list(found.values()), list(bind_static(static, _linear_part(static, given, along)).values())


def _linear_part(static: Static, given: Named, along: Named) -> list[Any]:
    """Return the operands with the tangents replaced by their own tangents."""
    return [along.get(name, jnp.zeros_like(x)) if _is_tangent(name) else x for name, x in given.items()]


def _is_tangent(name: str) -> bool:
    return name in {f"t{one}" for one in DIFFERENTIABLE}


def _backward_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, static: Static) -> Any:
    found = bind_static(static, list(primals))
    given, along = dict(zip(static.names, primals, strict=True)), _split(static, tangents)
    parts = []
    inputs = _tangents({name: x for name, x in along.items() if name not in ("out", "lse", "dout", "dlse")})
    if inputs:
        parts.append(_call(SECOND, given | inputs, static))
    if "dout" in along or "dlse" in along:
        linear = {name: along.get(name, jnp.zeros_like(given[name])) for name in ("dout", "dlse") if name in given}
        parts.append(_call(BACKWARD, given | linear, static, static.absent))
    change = {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in found} if parts else {}
    return list(found.values()), _in_order(static, primals, change)


def _cotangents(static: Static, given: Named, cotangents: Sequence[Any]) -> Named:
    """Return the cotangents of the results of a call by name, without symbolic zeros."""
    known = [_Known(x) for x in given.values()]
    wanted = results(static, known)
    return {
        one.name: x for one, x in zip(wanted, cotangents, strict=True) if x is not None and not isinstance(x, ad.Zero)
    }


class _Known:
    """Shape and dtype of an operand that may be linear."""

    def __init__(self, x: Any) -> None:
        aval = x.aval if ad.is_undefined_primal(x) else x
        self.shape, self.dtype = aval.shape, aval.dtype


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, static: Static) -> list[Any]:
    """Return the gradients along the tangents that are linear: the backward pass."""
    given = dict(zip(static.names, operands, strict=True))
    found = _cotangents(static, given, cotangents)
    linear = [name for name, x in given.items() if ad.is_undefined_primal(x)]
    if not found:
        return [None] * len(operands)
    primal = {name: x for name, x in given.items() if not _is_tangent(name)}
    saved = {"dout": found.get("tout", jnp.zeros_like(given["out"]))}
    if "tlse" in found:
        saved["dlse"] = found["tlse"]
    absent = [f"d{name}" for name in GRADIENTS if f"t{name}" not in linear]
    grads = _call(BACKWARD, primal | saved, static, absent)
    return [grads[f"d{name[1:]}"] if name in linear else None for name in static.names]


def _backward_transpose(cotangents: Sequence[Any], *operands: Any, static: Static) -> list[Any]:
    """Return the gradients along dout and dlse: the tangent pass."""
    given = dict(zip(static.names, operands, strict=True))
    found = _cotangents(static, given, cotangents)
    if not found:
        return [None] * len(operands)
    primal = {name: x for name, x in given.items() if name not in ("dout", "dlse")}
    tangent = _call(TANGENT, primal | {f"t{name[1:]}": x for name, x in found.items()}, static)
    named = {"dout": tangent["tout"], "dlse": tangent["tlse"]}
    return [named[name] if ad.is_undefined_primal(x) else None for name, x in given.items()]


def _second_transpose(cotangents: Sequence[Any], *operands: Any, static: Static) -> list[Any]:
    """Return the gradients along the tangents: the matrix of second derivatives is symmetric."""
    given = dict(zip(static.names, operands, strict=True))
    found = _cotangents(static, given, cotangents)
    if "ddout" in found or "ddlse" in found:
        raise NotImplementedError(ORDER)
    if not found:
        return [None] * len(operands)
    primal = {name: x for name, x in given.items() if not _is_tangent(name)}
    grads = _call(SECOND, primal | {f"t{name[1:]}": x for name, x in found.items()}, static)
    return [grads[f"d{name[1:]}"] if ad.is_undefined_primal(x) else None for name, x in given.items()]


def _refuse_append(primals: Sequence[Any], tangents: Sequence[Any], *, static: Static) -> Any:
    raise NotImplementedError(
        "the KV cache must not be differentiated, because no gradient flows through it. "
        "Pass jax.lax.stop_gradient of q, k, v and the caches."
    )


ad.primitive_jvps[PRIMITIVES["forward"]] = _forward_jvp
ad.primitive_jvps[PRIMITIVES["tangent"]] = _tangent_jvp
ad.primitive_jvps[PRIMITIVES["backward"]] = _backward_jvp
ad.primitive_jvps[PRIMITIVES["second"]] = _second_jvp
ad.primitive_jvps[PRIMITIVES["append"]] = _refuse_append
ad.primitive_transposes[PRIMITIVES["tangent"]] = _tangent_transpose
ad.primitive_transposes[PRIMITIVES["backward"]] = _backward_transpose
ad.primitive_transposes[PRIMITIVES["second"]] = _second_transpose
