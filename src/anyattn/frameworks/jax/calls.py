"""Computation of one call inside a program of JAX: XLA calls the CPU engine, or the host calls another backend.

XLA owns every buffer. A call of the CPU engine is a custom call whose attributes hold the C struct (`anyattn_xla.h`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from ...backends.base import Call
from ...backends.cpu import library
from ...backends.cpu.backend import CpuPlan
from ...config import settings
from ...definition import kvcache, quantised
from ...definition.inputs import TABLES
from ...definition.options import Options, Rotation
from ...definition.passes import APPEND, PASSES, SECOND, TANGENT
from ...definition.problem import Problem
from ...definition.reads import check_reads
from ...definition.sequences import check_tables
from ...definition.validate import make_problem
from ...runtime import dispatch
from ..numpy import adapter as numpy_adapter
from .arrays import describe

IN_PLACE = ("k", "v", "k_scale", "v_scale")  # operands of an append that are results too
_BY_NAME = {one.name: one for one in PASSES}


class Static(NamedTuple):
    """Arguments of a primitive that are not arrays."""

    pass_: str
    names: tuple[str, ...]  # of the operands, in their order in the pass
    options: Options | Rotation
    backend: str  # those that the caller named; "" if none
    absent: tuple[str, ...] = ()  # outputs of the pass that are not computed


class Result(NamedTuple):
    """Result of a primitive."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def named(backend: str | None) -> str:
    """Return the backends that the caller named, separated by commas; "" if none."""
    return ",".join(dispatch.named(backend))


def find(static: Static, arrays: Sequence[Any]) -> dispatch.Ready:
    """Return the problem of arrays, tracers or their types, and its plan."""
    backend = static.backend or ",".join(backends_of(static))
    return dispatch.lookup(("jax", static, _types(arrays)), backend, lambda: problem(static, arrays))


def backends_of(static: Static) -> tuple[str, ...]:
    """Return the backends of a call that names none.

    The CPU engine computes. The NumPy backend computes what the engine does not: some derivatives and score functions,
    and the gradients of queries of quantised keys.
    """
    others = static.pass_ in (TANGENT.name, SECOND.name) or "k_scale" in static.names
    others = others or (isinstance(static.options, Options) and bool(static.options.score))
    return ("cpu", "numpy") if others else ("cpu",)


def problem(static: Static, arrays: Sequence[Any]) -> Problem:
    """Return the validated problem of a call of a primitive."""
    return _problem(static, _types(arrays))


def _types(arrays: Sequence[Any]) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return tuple([(x.shape, x.dtype) for x in arrays])


@lru_cache(dispatch.CACHE_SIZE)
def _problem(static: Static, types: Sequence[tuple[tuple[int, ...], Any]]) -> Problem:
    described = {name: describe(name, *one) for name, one in zip(static.names, types, strict=True)}
    return make_problem(described, static.options, _BY_NAME[static.pass_])


def results(static: Static, arrays: Sequence[Any]) -> list[Result]:
    """Return the results of a primitive in their order."""
    found = problem(static, arrays)
    outputs = [Result(name, x.shape, x.dtype) for name, x in found.outputs().items() if name not in static.absent]
    if static.pass_ == APPEND.name:
        arrays_in_place = [(name, found.arrays[name]) for name in IN_PLACE if name in found.arrays]
        outputs += [Result(name, x.shape, x.dtype) for name, x in arrays_in_place]
    return outputs


def compute(static: Static, *arrays: Any) -> list[jax.Array]:
    """Compute the results of a pass."""
    ready = find(static, arrays)
    wanted = results(static, arrays)
    # The struct of a score function has addresses in this process, which a compiled program must not keep.
    if isinstance(ready.plan, CpuPlan) and not ready.problem.score:
        return _custom_call(static, ready.plan, wanted, arrays)
    types = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in wanted]
    found: list[jax.Array] = jax.pure_callback(lambda *xs: _on_host(static, wanted, xs), types, *arrays)
    return found


def _custom_call(static: Static, plan: CpuPlan, wanted: Sequence[Result], arrays: Sequence[Any]) -> list[jax.Array]:
    words, places = plan.packed()
    # An append does not read q if it has no rotary tables.
    operands = {name: x for name, x in zip(static.names, arrays, strict=True) if name in places}
    types = {one.name: jax.ShapeDtypeStruct(one.shape, one.dtype) for one in wanted}
    buffers = [*operands.items(), *types.items()]
    aliases = {list(operands).index(name): list(types).index(name) for name in operands if name in types}
    call = jax.ffi.ffi_call(register(static.pass_), list(types.values()), input_output_aliases=aliases)
    found: list[jax.Array] = call(
        *operands.values(),
        **{"pass": np.int32(library.PASSES[static.pass_])},
        call=np.frombuffer(words, np.int64),
        words=np.array([places[name] for name, _ in buffers], np.int64),
        bytes=np.array([math.prod(x.shape) * x.dtype.itemsize for _, x in buffers], np.int64),
    )
    return found


@cache
def register(pass_: str) -> str:
    """Register the handler of XLA's custom calls for a pass; return the name of the target."""
    target = f"anyattn_{pass_}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library.load().xla_handler()), platform="cpu")
    return target


def _on_host(static: Static, wanted: Sequence[Result], operands: Sequence[Any]) -> list[Any]:
    """Compute the results by a backend that takes NumPy arrays."""
    given = {name: np.asarray(x) for name, x in zip(static.names, operands, strict=True)}
    if "rng_state" in given:
        given["rng_state"] = given["rng_state"].view(np.int64)
    ready = find(static, operands)
    check_values(ready.problem, given)
    if static.pass_ == APPEND.name:
        given |= {name: given[name].copy() for name in IN_PLACE if name in given}
    outputs = {name: numpy_adapter.empty(shape, dtype, given["q"]) for name, shape, dtype in ready.outputs}
    arrays: dict[str, Any] = {**given, **{name: x for name, x in outputs.items() if name not in static.absent}}
    call = Call(numpy_adapter, None, **arrays)
    size = ready.plan.workspace_bytes
    call.workspace = numpy_adapter.empty((size,), "uint8", given["q"]) if size else None
    ready.plan.run(call)
    return [getattr(call, one.name) for one in wanted]


def check_values(problem: Problem, given: Mapping[str, Any]) -> None:
    """Check the values of tables, and the reads of score functions. Arrays are NumPy arrays here."""
    if problem.pass_ is APPEND:
        names = ("cache_seqlens", "cache_batch_idx", "block_table")
        limits = kvcache.append_limits(problem.arrays, by_row=problem.rotation.by_row)
        kvcache.check_append(limits, {name: given[name] for name in names if name in given})
    elif problem.has_tables:
        tables = {name: given[name] for name in TABLES if name in given}
        check_tables(problem, tables)
        if problem.quantised:
            scales = {name: given[name] for name in quantised.SCALES_OF.values() if name in given}
            quantised.check_values(problem, tables, scales, slots=settings.current().check)
        if problem.score:
            check_reads(problem, tables, given.get("captured_indices"))
