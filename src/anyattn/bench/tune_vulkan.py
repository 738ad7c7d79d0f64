"""Tuning of Vulkan offloading: measure from which size the current device is faster than the CPU, with transfers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import explicit
from ..backends.vulkan.offload import NEVER, Work, work
from ..definition.options import Options
from ..definition.passes import BACKWARD, FORWARD
from ..definition.problem import Array, Problem
from ..definition.validate import make_problem
from .timing import Timing, measure

DTYPES = ("float32", "float16", "bfloat16")
NHEADS, HEAD_DIM = 8, 64
SEQLENS = tuple(2**n for n in range(7, 15))
LONGEST = 0.5  # seconds of both backends; beyond this, no larger problem is measured
FASTER = 0.95  # Vulkan must take less than this share of the CPU's time, because smaller differences are noise
BACKENDS = ("cpu", "vulkan")

Arrays = Mapping[str, npt.NDArray[Any]]
Measure = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, Timing]]


class Point(NamedTuple):
    """Seconds of both backends at one size."""

    direction: str
    dtype: str
    seqlen: int
    cpu: float
    vulkan: float

    @property
    def won(self) -> bool:
        return self.vulkan < FASTER * self.cpu


def dtypes() -> dict[str, str]:
    """Return by dtype why it cannot be measured; "" if it can."""
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return dict.fromkeys(DTYPES, "") | {"bfloat16": "NumPy arrays of it need ml_dtypes: pip install ml_dtypes"}
    return dict.fromkeys(DTYPES, "")


def measure_points(direction: str, dtype: str, seconds: float) -> Iterator[Point]:
    """Measure larger and larger problems until Vulkan has won twice in a row or both take too long."""
    won = 0
    for seqlen in SEQLENS:
        functions = make_calls(direction, make_inputs(dtype, seqlen))
        for function in functions.values():  # compiles, and allocates memory
            function()
        times = measure(functions, seconds, rounds=3)
        point = Point(direction, dtype, seqlen, *(times[name].median for name in BACKENDS))
        yield point
        won = won + 1 if point.won else 0
        if won == 2 or point.cpu + point.vulkan > LONGEST:
            return


def find_threshold(points: list[Point]) -> Work:
    """Return the work of the smallest problem from which Vulkan always won; NEVER if it did not win the largest."""
    winning = NEVER
    for point in reversed(points):
        if not point.won:
            break
        winning = work(describe_point(point))
    return winning


def make_inputs(dtype: str, seqlen: int) -> Arrays:
    """Return q, k, v and dout of one sequence, unit normal."""
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  names the dtype
    draw = np.random.default_rng(seqlen).standard_normal
    shape = (1, seqlen, NHEADS, HEAD_DIM)
    return {name: draw(shape, np.float32).astype(dtype) for name in ("q", "k", "v", "dout")}


def make_calls(direction: str, given: Arrays) -> dict[str, Callable[[], Any]]:
    """Return the call to time by backend."""
    q, k, v, dout = (given[name] for name in ("q", "k", "v", "dout"))
    if direction == "forward":
        return {name: partial(explicit.attention_forward, q, k, v, backend=name) for name in BACKENDS}
    out, lse = explicit.attention_forward(q, k, v, backend="cpu")
    return {name: partial(explicit.attention_backward, dout, q, k, v, out, lse, backend=name) for name in BACKENDS}


def describe_point(point: Point) -> Problem:
    """Return the problem that was measured at a point."""
    shape, lse = (1, point.seqlen, NHEADS, HEAD_DIM), (1, NHEADS, point.seqlen)
    described = dict.fromkeys(("q", "k", "v"), Array(shape, _strides(shape), point.dtype))
    if point.direction == "backward":
        described |= dict.fromkeys(("out", "dout"), described["q"]) | {"lse": Array(lse, _strides(lse), "float32")}
    return make_problem(described, Options(), BACKWARD if point.direction == "backward" else FORWARD)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
