"""The change of a tangent along the inputs of attention, of which only the transpose is computed: the second pass.

So a tangent has gradients (reverse mode over forward mode), but no tangent of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ...definition.passes import SECOND
from . import varying
from .calls import Static, results
from .primitives import bind

ORDER = (
    "attention has no third derivative, and no forward mode inside forward mode. "
    "Compute Hessians as jax.jacfwd(jax.jacrev(f))."
)

_curvature = Primitive("anyattn_curvature")
_curvature.multiple_results = True


def change(static: Static, given: Mapping[str, Any], along: Mapping[str, Any]) -> list[Any]:
    """Return the change of (tout, tlse) along tangents of the inputs, which are linear operands.

    static: of the tangent pass. given: its operands by name.
    """
    found: list[Any] = _curvature.bind(*given.values(), *along.values(), static=static, along=tuple(along))
    return found


@_curvature.def_abstract_eval
def _types(*operands: Any, static: Static, along: tuple[str, ...]) -> list[Any]:
    arrays = operands[: len(static.names)]
    return [varying.type_like(arrays[0], one.shape, one.dtype) for one in results(static, arrays)]


@_curvature.def_impl
def _evaluate(*operands: Any, **params: Any) -> Any:
    raise NotImplementedError(ORDER)


def _refuse(operands: Sequence[Any], others: Sequence[Any], **params: Any) -> Any:
    """Raise in forward mode and vmap, which meet the change only inside forward mode inside forward mode."""
    raise NotImplementedError(ORDER)


def _transpose(cotangents: Sequence[Any], *operands: Any, static: Static, along: tuple[str, ...]) -> list[Any]:
    """Return the gradients of <dtout, tout> + <dtlse, tlse> along the inputs."""
    given = dict(zip(static.names, operands, strict=False))
    dtout, dtlse = cotangents
    if isinstance(dtout, ad.Zero) and isinstance(dtlse, ad.Zero):
        return [None] * len(operands)
    given["dout"] = jnp.zeros_like(given["out"]) if isinstance(dtout, ad.Zero) else dtout
    if not isinstance(dtlse, ad.Zero):
        given["dlse"] = dtlse
    found = bind(SECOND, [given.get(name) for name in SECOND.inputs], static.options, static.backend)
    return [None] * len(static.names) + [found[f"d{name[1:]}"] for name in along]


ad.primitive_jvps[_curvature] = batching.primitive_batchers[_curvature] = _refuse
ad.primitive_transposes[_curvature] = _transpose
mlir.register_lowering(_curvature, _evaluate)
