"""Self-test of a driver: each compute path is compared with the definition before its first use.

Drivers have bugs that our tests cannot reach. A path that computes wrongly is excluded, and the next one is tried.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition import accuracy
from ...definition.dtypes import DTYPES, narrow, widen
from ...definition.inputs import Extras, Inputs, replace_extras
from ...definition.options import Options
from ...definition.passes import BACKWARD, FORWARD, Pass
from ...definition.problem import Problem, contiguous
from ...definition.score.trace import captured, trace
from ...definition.validate import make_problem
from ..base import Call
from .api import DeviceLost, VulkanError
from .backward import BackwardPlan
from .device_info import SCALAR, DeviceInfo
from .engine import Engine
from .forward import ForwardPlan

logger = logging.getLogger("anyattn")

# Several tiles of queries and keys plus a remainder; head dims that are not a whole number of vectors per lane.
SHAPES = {"q": (1, 70, 2, 72), "k": (1, 150, 1, 72), "v": (1, 150, 1, 40), "dout": (1, 70, 2, 40)}
LSE_SHAPE = (1, 2, 70)
SOFTCAP = 20.0
OPTIONS = Options(left=100, right=0, softcap=SOFTCAP)
# What score_mod and mask_mod read.
CAPTURED = {
    "captured": np.linspace(0.5, 1.5, 2, dtype=np.float32),
    "captured_indices": np.arange(150, dtype=np.int32) % 7,
}

Arrays = dict[str, npt.NDArray[Any]]
# (driver, direction, dtype) -> path -> why it is excluded; "": passed
_results: dict[tuple[str, str, str], dict[str, str]] = {}


def failures() -> list[str]:
    """Return the paths that are excluded in this process, with reasons."""
    return [
        f"{path}: {why} ({direction}, {dtype})"
        for (_, direction, dtype), results in _results.items()
        for path, why in results.items()
        if why
    ]


def usable(engine: Engine, pass_: Pass, dtype: str, *, functions: bool = False) -> DeviceInfo:
    """Return the device without the paths that fail. functions: shaders that are linked with score functions.

    Raises:
        VulkanError: every path fails.
        DeviceLost: the device did not survive the last path.
        DeviceMemoryError: the device has not enough memory.
    """
    info, problem = engine.device.info, _problem(pass_, dtype, functions)
    direction = f"{pass_} with functions" if functions else pass_.name
    results = _results.setdefault((info.cache_key, direction, dtype), {})
    while True:
        plan = (ForwardPlan if pass_ is FORWARD else BackwardPlan)(engine, info, problem)
        if plan.path not in results:
            results[plan.path] = wrong = _try(plan, problem)
            if wrong:
                logger.warning("%s: excluding %s: %s (%s, %s)", info.name, plan.path, wrong, direction, dtype)
        wrong = results[plan.path]
        if not wrong:
            return info
        if plan.path == SCALAR:
            raise VulkanError(f"{info.name} computes wrongly: {wrong} ({direction}, {dtype})")
        info = info.without(plan.path)


def _problem(pass_: Pass, dtype: str, functions: bool) -> Problem:
    given = {name: contiguous(shape, dtype) for name, shape in SHAPES.items() if name in pass_.inputs}
    options = OPTIONS
    if functions:
        given |= {name: contiguous(x.shape, str(x.dtype)) for name, x in CAPTURED.items()}
        options = OPTIONS._replace(score=_functions())
    if pass_ is BACKWARD:
        given |= {"out": given["dout"], "lse": contiguous(LSE_SHAPE, "float32")}
    return make_problem(given, options, pass_)


@cache
def _functions() -> str:
    """Return the text of functions with reads, integers, and functions of the library that Vulkan's own replace."""
    factors, groups = captured(CAPTURED["captured"]), captured(CAPTURED["captured_indices"])

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = (q_idx - kv_idx) * 0.03
        raised = np.where(score > 0, np.tanh(score), np.exp(score) - 1)
        return raised * factors[h] + np.cos(distance) - np.log(1 + abs(distance)) * np.power(1 + abs(distance), 1.5) / 9

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (groups[kv_idx] != 3) | ((q_idx - kv_idx) // 5 % 3 == 1)

    graph = trace(score_mod, mask_mod).graph
    return graph._replace(arrays=tuple([one._replace(gradient=False) for one in graph.arrays])).text


class _HostArrays:
    """Adapter for NumPy arrays whose bfloat16 is already stored as bits."""

    name = "numpy"

    def numpy(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array


def _try(plan: Any, problem: Problem) -> str:
    """Return why the plan cannot be used; "" if it can."""
    try:
        return _mismatches(plan, problem)
    except VulkanError as error:
        if isinstance(error, DeviceLost) and plan.path == SCALAR:
            raise  # says nothing about the next call
        return str(error)


def _mismatches(plan: Any, problem: Problem) -> str:
    dtype, rng = problem.dtype, np.random.default_rng(0)
    arrays = {name: narrow(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    extras = Extras()
    if problem.score:
        arrays |= CAPTURED
        extras = replace_extras(extras, **CAPTURED)
    inputs = Inputs(arrays["q"], arrays["k"], arrays["v"], extras)
    call = Call(_HostArrays(), inputs)  # type: ignore[arg-type]  # the only method that plans use
    forward = wanted = accuracy.expected_forward(problem, arrays, random=True)
    if problem.pass_ is BACKWARD:
        call.out, call.lse = narrow(forward["out"].value, dtype), forward["lse"].value.astype(np.float32)
        call.dout = arrays["dout"]
        do = widen(arrays["dout"], dtype)
        wanted = accuracy.expected_backward(problem, arrays, do, None, random=True)
    for name, want in wanted.items():
        setattr(call, name, narrow(np.full_like(want.value, np.nan), "float32" if name == "lse" else dtype))
    plan.run(call)
    permitted = _permitted_error(forward["lse"].magnitude.max())
    return "; ".join(filter(None, (_mismatch(call, name, want, permitted) for name, want in wanted.items())))


def _mismatch(call: Call, name: str, want: accuracy.Expected, permitted: float) -> str:
    error = want.error(getattr(call, name))
    accepted = want.budget + permitted * want.magnitude.max()
    return "" if error <= accepted else f"{name} is off by {error:.2g}, more than {accepted:.2g}"


def _permitted_error(largest_score: float) -> float:
    """Return the relative error of P that Vulkan allows a driver, whose exp2(x) has an error of 3 + 2 |x| units.

    One exponent is the difference of two scores. The other is tanh's, whose error is multiplied by softcap / 2.
    """
    softmax, tanh = 2 * largest_score * math.log2(math.e), 2 * largest_score / SOFTCAP * math.log2(math.e)
    return DTYPES["float32"].eps * ((3 + 2 * softmax) + SOFTCAP / 2 * (3 + 2 * tanh))
