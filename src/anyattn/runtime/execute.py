"""Execution of one call for every framework and pass: find the plan, allocate the outputs, run the plan.

Arrays are prepared by each framework's `prepare`: last dimension contiguous, tables int32, slopes and sink in the
compute dtype, bias and mask with four dimensions. A caller that owns the output buffers calls only `find` and `run`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ..backends.base import Adapter, Call
from ..config import settings
from ..definition import kvcache, quantised
from ..definition.inputs import TABLES, Appended, Gradients, Inputs, Saved, SecondGradients, Tangents, flatten
from ..definition.options import Options, Rotation
from ..definition.passes import APPEND, BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT, Pass
from ..definition.problem import Problem, described
from ..definition.reads import check_reads, check_sizes
from ..definition.sequences import check_tables
from ..definition.validate import make_problem
from . import dispatch

_APPEND_TABLES = ("cache_seqlens", "cache_batch_idx", "block_table")


def find(
    adapter: Adapter,
    pass_: Pass,
    arrays: Inputs | Appended,
    options: Options | Rotation,
    backend: str | None,
    metadata: Hashable = None,
    saved: tuple[Any, ...] = (),
) -> dispatch.Ready:
    """Return the problem of the arrays and its plan. The values of its tables are checked.

    metadata: the adapter's key of `flatten(arrays, saved)`, if the caller already has it.
    """
    key = (pass_.name, options, metadata or adapter.keys(flatten(arrays, saved)))
    ready = dispatch.lookup(key, backend, lambda: _problem(adapter, pass_, flatten(arrays, saved), options))
    if ready.has_tables:
        _check_values(adapter, ready.problem, dict(zip(pass_.inputs, flatten(arrays, saved), strict=False)))
    return ready


def allocate(adapter: Adapter, ready: dispatch.Ready, call: Call, absent: Sequence[str] = ()) -> None:
    """Allocate the workspace and the outputs of a call, except the outputs in `absent`."""
    like, arrays = call.q, call.__dict__
    for name, shape, dtype in ready.outputs:
        if name not in absent:
            arrays[name] = adapter.empty(shape, dtype, like)
    size = ready.plan.workspace_bytes
    if size:
        call.workspace = _workspace(adapter, size, like)


def run(ready: dispatch.Ready, call: Call) -> None:
    """Run the plan on a call that has every input, output and workspace."""
    ready.plan.run(call)


def forward(
    adapter: Adapter,
    inputs: Inputs,
    options: Options,
    backend: str | None,
    metadata: Hashable = None,
    *,
    want_lse: bool = True,
) -> tuple[Any, Any]:
    """Return (out, lse), new and contiguous. lse may be None if it is not wanted."""
    ready = find(adapter, FORWARD, inputs, options, backend, metadata)
    call = Call(adapter, inputs)
    allocate(adapter, ready, call, () if want_lse or not ready.plan.lse_optional else ("lse",))
    ready.plan.run(call)
    return call.out, call.lse


def backward(
    adapter: Adapter,
    saved: Saved,
    inputs: Inputs,
    options: Options,
    backend: str | None,
    metadata: Hashable = None,
    *,
    absent: Sequence[str] = (),
) -> Gradients:
    """Return the gradients, new and contiguous; None for those in `absent` and for absent arrays."""
    ready = find(adapter, BACKWARD, inputs, options, backend, metadata, saved)
    call = Call(adapter, inputs)
    call.out, call.lse, call.dout, call.dlse = saved
    allocate(adapter, ready, call, absent)
    ready.plan.run(call)
    return Gradients(*_gradients(call))


def tangent(
    adapter: Adapter,
    out: Any,
    lse: Any,
    tangents: Tangents,
    inputs: Inputs,
    options: Options,
    backend: str | None,
    metadata: Hashable = None,
) -> tuple[Any, Any]:
    """Return (tout, tlse), new and contiguous; (out, lse) are the results of the forward pass."""
    ready = find(adapter, TANGENT, inputs, options, backend, metadata, (out, lse, *tangents))
    call = Call(adapter, inputs, out=out, lse=lse, **tangents._asdict())
    allocate(adapter, ready, call)
    ready.plan.run(call)
    return call.tout, call.tlse


def forward_tangent(
    adapter: Adapter,
    tangents: Tangents,
    inputs: Inputs,
    options: Options,
    backend: str | None,
    metadata: Hashable = None,
) -> tuple[Any, Any, Any, Any]:
    """Return (out, lse, tout, tlse), new and contiguous."""
    ready = find(adapter, FORWARD_TANGENT, inputs, options, backend, metadata, tangents)
    call = Call(adapter, inputs, **tangents._asdict())
    allocate(adapter, ready, call)
    ready.plan.run(call)
    return call.out, call.lse, call.tout, call.tlse


def second(
    adapter: Adapter,
    saved: Saved,
    tangents: Tangents,
    inputs: Inputs,
    options: Options,
    backend: str | None,
    metadata: Hashable = None,
) -> SecondGradients:
    """Return the gradients of <dout, tout> + <dlse, tlse>, new and contiguous; None for absent arrays."""
    ready = find(adapter, SECOND, inputs, options, backend, metadata, (*saved, *tangents))
    call = Call(adapter, inputs, **saved._asdict(), **tangents._asdict())
    allocate(adapter, ready, call)
    ready.plan.run(call)
    return SecondGradients(*_second_gradients(call))


_second_gradients = operator.attrgetter(*SecondGradients._fields)
_gradients = operator.attrgetter(*Gradients._fields)


def append(
    adapter: Adapter, arrays: Appended, rotation: Rotation, backend: str | None, *, check: Callable[[], None]
) -> Any:
    """Write new_k and new_v into the cache in place; return q, rotated if rotary tables are given.

    `check` raises if the attention after the append would raise. It runs before anything is written.
    """
    ready = find(adapter, APPEND, arrays, rotation, backend)
    check()
    call = Call(adapter, **arrays._asdict())
    allocate(adapter, ready, call)
    ready.plan.run(call)
    return arrays.q if call.out is None else call.out


def check(adapter: Adapter, inputs: Inputs, options: Options, backend: str | None) -> None:
    """Check everything that `forward` checks, before anything is written."""
    find(adapter, FORWARD, inputs, options, backend)


def check_values(adapter: Adapter, inputs: Inputs, options: Options) -> None:
    """Check a call that no backend computes, and the values of its tables, with the errors of `forward`."""
    problem = _problem(adapter, FORWARD, flatten(inputs), options)
    if problem.has_tables:
        _check_values(adapter, problem, dict(zip(FORWARD.inputs, flatten(inputs), strict=False)))


def warmup(adapter: Adapter, inputs: Inputs, options: Options, backend: str | None, *, backward: bool) -> None:
    """Compile the kernels that `forward` and, on request, `backward` need for these arrays; compute nothing."""
    names = dispatch.named(backend)
    problem = _problem(adapter, FORWARD, flatten(inputs), options)
    dispatch.plan(problem, names).warmup()
    if backward:
        outputs = problem.outputs()
        saved = Saved(out=outputs["out"], lse=outputs["lse"], dout=outputs["out"])
        arrays = {**problem.arrays, **saved._asdict()}
        dispatch.plan(make_problem(arrays, options, BACKWARD), names).warmup()


def explain(adapter: Adapter, inputs: Inputs, options: Options, backend: str | None) -> dispatch.Explanation:
    """Return the backend that `forward` would use, and why not the others."""
    return dispatch.explain(_problem(adapter, FORWARD, flatten(inputs), options), dispatch.named(backend))


def _problem(adapter: Adapter, pass_: Pass, arrays: Sequence[Any], options: Options | Rotation) -> Problem:
    return make_problem(described(pass_.inputs, arrays, adapter.describe), options, pass_)


def _workspace(adapter: Adapter, size: int, like: Any) -> Any:
    try:
        return adapter.empty((size,), "uint8", like)
    except MemoryError as error:
        raise MemoryError(f"no memory for {size} bytes of workspace.") from error


def _check_values(adapter: Adapter, problem: Problem, given: Mapping[str, Any]) -> None:
    """Check tables in host memory before any computation, and tables on a device only if ANYATTN_CHECK is set."""
    if not (adapter.tables_on_host(problem.device) or settings.current().check):
        if problem.score and not any(name in problem.arrays for name in TABLES):
            check_sizes(problem.score, (problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k))
        return
    names = _APPEND_TABLES if problem.pass_ is APPEND else TABLES
    tables = {name: adapter.numpy(given[name]) for name in names if given.get(name) is not None}
    if problem.pass_ is APPEND:
        kvcache.check_append(kvcache.append_limits(problem.arrays, by_row=problem.rotation.by_row), tables)
    else:
        check_tables(problem, tables)
        if problem.quantised:
            scales = {name: adapter.numpy(given[name]) for name in quantised.SCALES_OF.values()}
            quantised.check_values(problem, tables, scales, slots=settings.current().check)
        if problem.score:
            indices = given.get("captured_indices")
            check_reads(problem, tables, None if indices is None else adapter.numpy(indices))
