"""Primitives of JAX: one for each pass, with the rules for shapes, evaluation and compilation.

`derivatives.py` and `batching.py` hold the rules for gradients and vmap. `sharding.py` divides calls over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ...definition.options import Options, Rotation
from ...definition.passes import PASSES, Pass
from ...definition.problem import described
from . import sharding, varying
from .arrays import ELSEWHERE
from .calls import Static, compute, named, results

PRIMITIVES: dict[str, Primitive] = {}


def bind(
    pass_: Pass,
    arrays: Sequence[Any],
    options: Options | Rotation,
    backend: str | None,
    absent: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the results of a pass by name. arrays: the inputs of the pass in their order; None: absent."""
    given = described(pass_.inputs, arrays, lambda x: x)
    static = Static(pass_.name, tuple(given), options, named(backend), tuple(absent))
    return bind_static(static, list(given.values()))


def bind_static(static: Static, arrays: Sequence[Any]) -> dict[str, Any]:
    """Return the results of a pass by name. Axes of a mesh that are explicit become automatic for the call."""

    def call(*xs: Any) -> list[Any]:
        return list(PRIMITIVES[static.pass_].bind(*varying.alike(xs), static=static))

    shardings = sharding.explicit(static, arrays)
    found = call(*arrays) if shardings is None else jax.sharding.auto_axes(call, out_sharding=shardings)(*arrays)
    return {one.name: x for one, x in zip(results(static, arrays), found, strict=True)}


def _types(*arrays: Any, static: Static) -> list[Any]:
    found = results(static, arrays)
    return [varying.type_like(arrays[0], one.shape, one.dtype) for one in found]


@cache
def _compiled(static: Static) -> Any:
    return jax.jit(lambda *arrays: PRIMITIVES[static.pass_].bind(*arrays, static=static))


def _evaluate(*arrays: Any, static: Static) -> Any:
    with jax.disable_jit(False):
        return _compiled(static)(*arrays)


def _refuse(context: Any, *arrays: Any, static: Static) -> Any:
    platforms = ", ".join(context.module_context.platforms)
    raise NotImplementedError(f"q must be a JAX array on the CPU, got one in a program for {platforms}. {ELSEWHERE}")


def _make(pass_: Pass) -> Primitive:
    made = Primitive(f"anyattn_{pass_.name}")
    made.multiple_results = True
    made.def_impl(_evaluate)
    made.def_abstract_eval(_types)
    mlir.register_lowering(made, _refuse)
    rule = sharding.partitioned if sharding.enable(made) else compute
    lowering = mlir.lower_fun(lambda *arrays, static: rule(static, *arrays), multiple_results=True)
    mlir.register_lowering(made, lowering, platform="cpu")
    return made


PRIMITIVES.update({pass_.name: _make(pass_) for pass_ in PASSES})
