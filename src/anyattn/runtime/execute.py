"""One call, for every framework: find the plan, check table values, allocate the results, run.

Arrays come prepared (see each framework's `prepare`): in the order of `problem.INPUTS`, last dimension contiguous,
tables int32, slopes and sink in the compute dtype, bias and mask with four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from ..backends.base import Adapter, Call, contiguous
from ..config import settings
from ..definition.kvcache import ARRAYS as APPEND_ARRAYS
from ..definition.kvcache import check_append, make_append, room
from ..definition.problem import INPUTS, SAVED, TABLES, Array, Options, Problem, make_problem
from ..definition.sequences import check_tables
from . import dispatch

_FIRST_TABLE = INPUTS.index(TABLES[0])
_LAST_TABLE = _FIRST_TABLE + len(TABLES)
_ABSENT = (None,) * (len(INPUTS) - 3)
Arrays = tuple[Any, ...]


def full(arrays: Arrays) -> Arrays:
    """All of INPUTS, from those or from q, k and v alone."""
    return arrays if len(arrays) > 3 else (*arrays, *_ABSENT)


def forward(
    adapter: Adapter,
    arrays: Arrays,
    options: Options,
    backend: str | None,
    metadata: Hashable = None,
    *,
    want_lse: bool = True,
) -> tuple[Any, Any]:
    """(out, lse), new and contiguous; lse may be None where it is not wanted.

    metadata: of the arrays, where the caller has it already.
    """
    problem, plan, out_shape, lse_shape, _ = find(adapter, arrays, options, backend, metadata)
    q = arrays[0]
    call = Call(adapter, *arrays)
    call.out = adapter.empty(out_shape, problem.dtype, q)
    if want_lse or not plan.lse_optional:
        call.lse = adapter.empty(lse_shape, problem.compute_dtype, q)
    if plan.forward_bytes:
        call.workspace = _workspace(adapter, plan.forward_bytes, q)
    plan.forward(call)
    return call.out, call.lse


def backward(
    adapter: Adapter,
    saved: Arrays,
    arrays: Arrays,
    options: Options,
    backend: str | None,
    metadata: Hashable = None,
    *,
    want_dbias: bool = True,
    want_dsink: bool = True,
) -> Arrays:
    """(dq, dk, dv, dbias or None, dsink or None) from `saved` = (out, lse, dout, dlse or None).

    metadata: of (*arrays, *saved), where the caller has it already.
    """
    key = (options, metadata or adapter.keys((*arrays, *saved)), "backward")
    described = (*INPUTS, *SAVED)
    ready = dispatch.lookup(
        key, backend, lambda: make_problem(_describe(adapter, described, (*full(arrays), *saved)), options)
    )
    if ready.has_tables:
        _check_values(adapter, ready.problem, arrays)
    problem, plan = ready.problem, ready.plan
    q = arrays[0]
    call = Call(adapter, *arrays)
    call.out, call.lse, call.dout, call.dlse = saved
    call.dq = adapter.empty(problem.q.shape, problem.dtype, q)
    call.dk = adapter.empty(problem.k.shape, problem.dtype, q)
    call.dv = adapter.empty(problem.v.shape, problem.dtype, q)
    if problem.bias is not None and want_dbias:
        call.dbias = adapter.empty(problem.bias.shape, problem.bias.dtype, q)
    if problem.sink is not None and want_dsink:
        call.dsink = adapter.empty(problem.sink.shape, problem.sink.dtype, q)
    if plan.backward_bytes:
        call.workspace = _workspace(adapter, plan.backward_bytes, q)
    plan.backward(call)
    return call.dq, call.dk, call.dv, call.dbias, call.dsink


def _workspace(adapter: Adapter, size: int, like: Any) -> Any:
    try:
        return adapter.empty((size,), "uint8", like)
    except MemoryError as error:
        raise MemoryError(f"no memory for {size} bytes of workspace") from error


def check(adapter: Adapter, arrays: Arrays, options: Options, backend: str | None) -> None:
    """Everything that `forward` checks, before something else is written."""
    find(adapter, arrays, options, backend)


def warmup(adapter: Adapter, arrays: Arrays, options: Options, backend: str | None, *, backward: bool) -> None:
    """Compiles what `forward` and, if asked for, `backward` need for these arrays, and runs nothing."""
    described = _describe(adapter, INPUTS, arrays)
    names = dispatch.named(backend)
    problem = make_problem(described, options)
    dispatch.plan(problem, names).warmup()
    if backward:
        out = contiguous(problem.out_shape, problem.dtype, problem.device)
        lse = contiguous(problem.lse_shape, problem.compute_dtype, problem.device)
        problem = make_problem({**described, "out": out, "dout": out, "lse": lse}, options)
        dispatch.plan(problem, names).warmup()


def explain(adapter: Adapter, arrays: Arrays, options: Options, backend: str | None) -> dispatch.Explanation:
    """Which backend `forward` would take and why not the others."""
    return dispatch.explain(make_problem(_describe(adapter, INPUTS, arrays), options), dispatch.named(backend))


def append(
    adapter: Adapter,
    arrays: dict[str, Any],
    *,
    check: Callable[[], None],
    interleaved: bool,
    by_row: bool,
    backend: str | None,
) -> Any:
    """Writes new_k and new_v into the cache and returns q, rotated if rotary is given. See kvcache.Append.

    `check` raises if the attention behind the append would; it runs before anything is written.
    """
    described = _describe(adapter, APPEND_ARRAYS, tuple(arrays.get(name) for name in APPEND_ARRAYS))
    problem = make_append(described, interleaved=interleaved, by_row=by_row)
    engine = dispatch.choose_append(problem, dispatch.named(backend))
    if _tables_are_checked(problem.q.device):
        tables = {name: arrays.get(name) for name in ("cache_seqlens", "cache_batch_idx", "block_table")}
        check_append(room(problem), {name: None if x is None else adapter.numpy(x) for name, x in tables.items()})
    check()
    call = Call(adapter, **{name: arrays.get(name) for name in APPEND_ARRAYS})
    if problem.rotary_dim:
        call.out = adapter.empty(problem.q.shape, problem.q.dtype, arrays["q"])
    engine.append(problem, call)
    return call.out if problem.rotary_dim else arrays["q"]


def _describe(adapter: Adapter, names: tuple[str, ...], arrays: Arrays) -> dict[str, Array | None]:
    return {name: None if x is None else adapter.describe(x) for name, x in zip(names, arrays, strict=True)}


def find(
    adapter: Adapter, arrays: Arrays, options: Options, backend: str | None, metadata: Hashable = None
) -> dispatch.Ready:
    """The forward pass that the arrays ask for, its tables checked."""
    key = (options, metadata or adapter.keys(arrays))
    ready = dispatch.lookup(key, backend, lambda: make_problem(_describe(adapter, INPUTS, full(arrays)), options))
    if ready.has_tables:
        _check_values(adapter, ready.problem, arrays)
    return ready


def _tables_are_checked(device: str) -> bool:
    """Those of Vulkan's arrays stay in host memory."""
    return device == "cpu" or device.startswith("vulkan") or settings.current().check


def _check_values(adapter: Adapter, problem: Problem, arrays: Arrays) -> None:
    """Tables in host memory are checked before any work; on a device only if ANYATTN_CHECK asks for it."""
    if not _tables_are_checked(problem.device):
        return
    tables = arrays[_FIRST_TABLE:_LAST_TABLE]
    views = {name: None if x is None else adapter.numpy(x) for name, x in zip(TABLES, tables, strict=True)}
    check_tables(problem, views)
