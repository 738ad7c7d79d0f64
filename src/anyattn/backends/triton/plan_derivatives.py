"""Plans of tangents and of second derivatives.

A second derivative starts with delta, then the tangent. Then follow dk and dv by tiles of keys, and dq by tiles of
queries; dbias and dsink if the call has a bias and a sink.
"""

from __future__ import annotations

import math

from ...definition.passes import SECOND
from ...definition.problem import Problem, contiguous
from . import tuning
from .arguments import common, dense, dims, flags, options, statistics, view
from .device import device
from .launch import Address, Kernel, Template, i32
from .plan_backward import (
    BYTES,
    Biases,
    bias_kernels,
    delta_kernel,
    delta_view,
    key_schedule,
    plan_bias,
    row_schedule,
)
from .second import attention_second_dbias, attention_second_dkv, attention_second_dq, attention_second_dsink
from .tangent import attention_tangent
from .tuning import Config
from .views import Dense, View


def tangent_kernels(problem: Problem) -> tuple[list[Kernel], int]:
    """Return (kernels, bytes of workspace)."""
    return [tangent_kernel(problem)], 0


def second_kernels(problem: Problem) -> tuple[list[Kernel], int]:
    """Return (kernels, bytes of workspace)."""
    gpu, width = device(problem.device), _width(problem)
    config = tuning.second(gpu.arch, problem.dtype, width)
    kernels = [delta_kernel(problem), tangent_kernel(problem), dkv_kernel(problem, config), dq_kernel(problem, config)]
    used = 2 * _row_bytes(problem)  # for delta and g
    if problem.bias is not None:
        reduction = plan_bias(problem, problem.bias, config, gpu)
        kernels += bias_kernels(problem, problem.bias, reduction, used, Biases(attention_second_dbias, inputs(problem)))
        used += reduction.bytes
    if problem.sink is not None:
        kernels.append(sink_kernel(problem))
    return kernels, used


def tangent_kernel(problem: Problem) -> Kernel:
    """Return the kernel of tout and tlse; in a pass of second derivatives these are ddout and ddlse."""
    assert problem.out is not None and problem.lse is not None
    second = problem.pass_ is SECOND
    out, lse = ("ddout", "ddlse") if second else ("tout", "tlse")
    config = tuning.tangent(device(problem.device).arch, problem.dtype, _width(problem))
    order, programs = row_schedule(problem, config.tile_q)
    arguments = (
        *(view(name, getattr(problem, name)) for name in ("q", "k", "v", "out")),
        *(statistics("lse", problem.lse), *tangents(problem), _tsink(problem)),
        view("dout", problem.dout) if second and problem.dout is not None else None,
        view(out, contiguous(problem.out_shape, problem.result_dtype)),
        statistics(lse, contiguous(problem.lse_shape, "float32")),
        inner_view(problem) if second else None,
        *(*common(problem), order),
    )
    return Kernel(attention_tangent, Template(arguments, _by_row(problem, config)), (programs, 1), options(config))


def dkv_kernel(problem: Problem, config: Config) -> Kernel:
    order, programs = key_schedule(problem, config.tile_k)
    results = [view(f"d{name}", contiguous(getattr(problem, name).shape, problem.result_dtype)) for name in ("k", "v")]
    arguments = (*inputs(problem), *results, *common(problem), order)
    constants = {**dims(problem), "TILE_Q": config.tile_q, "TILE_K": config.tile_k}
    constants |= {name: flags(problem)[name] for name in ("TOP_LEFT", "LOWER", "PRECISION")}
    return Kernel(attention_second_dkv, Template(arguments, constants), (programs, 1), options(config))


def dq_kernel(problem: Problem, config: Config) -> Kernel:
    order, programs = row_schedule(problem, config.tile_q)
    dq = view("dq", contiguous(problem.q.shape, problem.result_dtype))
    arguments = (*inputs(problem), dq, *common(problem), order)
    return Kernel(attention_second_dq, Template(arguments, _by_row(problem, config)), (programs, 1), options(config))


def sink_kernel(problem: Problem) -> Kernel:
    assert problem.lse is not None
    rows = problem.lse_shape[-1]
    count = math.prod(problem.lse_shape) // problem.nheads
    arguments = (
        Address("sink", "float32"), _tsink(problem), statistics("lse", problem.lse), tlse_view(problem),
        delta_view(problem), inner_view(problem), Address("dsink", "float32"), i32(max(rows, 1)), i32(count),
    )  # fmt: skip
    template = Template(arguments, {"TILE": tuning.SUM_ELEMENTS})
    return Kernel(attention_second_dsink, template, (problem.nheads, 1), {})


def inputs(problem: Problem) -> tuple[View | Dense | None, ...]:
    """Return the arrays of queries and keys in the parameter order of the kernels of second derivatives."""
    assert problem.dout is not None and problem.lse is not None
    arrays = [view(name, getattr(problem, name)) for name in ("q", "k", "v", "dout")]
    sums = statistics("lse", problem.lse), delta_view(problem), tlse_view(problem), inner_view(problem)
    return (*arrays, *sums, *tangents(problem))


def tangents(problem: Problem) -> tuple[View | Dense | None, ...]:
    """Return tq, tk, tv and tbias."""
    given = {name: getattr(problem, name) for name in ("tq", "tk", "tv")}
    return (*(None if x is None else view(name, x) for name, x in given.items()), dense("tbias", problem.tbias))


def tlse_view(problem: Problem) -> View:
    return statistics("ddlse", contiguous(problem.lse_shape, "float32"))


def inner_view(problem: Problem) -> View:
    """Return the view of g = <dout, tout>, which follows delta in the workspace."""
    pointer, *strides = delta_view(problem)
    return View(Address(pointer.name, pointer.dtype, _row_bytes(problem)), *strides)


def _tsink(problem: Problem) -> Address | None:
    return None if problem.tsink is None else Address("tsink", "float32")


def _row_bytes(problem: Problem) -> int:
    """Return the bytes of one number per query and head; at least one, because an empty array has no address."""
    return BYTES * max(math.prod(problem.lse_shape), 1)


def _width(problem: Problem) -> int:
    return max(sum(tuning.chunks(problem.head_dim)), sum(tuning.chunks(problem.head_dim_v)))


def _by_row(problem: Problem, config: Config) -> dict[str, object]:
    """Return the constants of a kernel whose programs own tiles of queries."""
    constants = {**dims(problem), "TILE_Q": config.tile_q, "TILE_K": config.tile_k}
    constants |= {name: flags(problem)[name] for name in ("TOP_LEFT", "LOWER", "HOLES", "PRECISION")}
    return {**constants, "LAST_FIRST": problem.interval.right is not None}
