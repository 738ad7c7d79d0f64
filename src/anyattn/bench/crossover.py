"""From which size on the Vulkan device in use is faster than the native engine, transfers included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import api
from ..backends.vulkan import crossover
from ..backends.vulkan.crossover import NEVER, Crossover
from ..definition.problem import Array, Options, Problem, make_problem
from .timing import Timing, measure

DTYPES = ("float32", "float16", "bfloat16")
NHEADS, HEAD_DIM = 8, 64
SEQLENS = tuple(2**n for n in range(7, 15))
LONGEST = 0.5  # seconds of both together, above which no larger problem is measured
FASTER = 0.95  # of its time, to count as faster: a difference below is noise
BACKENDS = ("cpu", "vulkan")

Arrays = Mapping[str, npt.NDArray[Any]]
Measure = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, Timing]]


class Point(NamedTuple):
    """Seconds of both engines at one size."""

    direction: str
    dtype: str
    seqlen: int
    cpu: float
    vulkan: float

    @property
    def won(self) -> bool:
        return self.vulkan < FASTER * self.cpu


def dtypes() -> dict[str, str]:
    """dtype -> why it cannot be measured; "" where it can."""
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return dict.fromkeys(DTYPES, "") | {"bfloat16": "NumPy arrays of it need ml_dtypes: pip install ml_dtypes"}
    return dict.fromkeys(DTYPES, "")


def points(direction: str, dtype: str, seconds: float) -> Iterator[Point]:
    """Ever larger problems, until Vulkan has won twice in a row or both take too long."""
    won = 0
    for seqlen in SEQLENS:
        functions = calls(direction, inputs(dtype, seqlen))
        for function in functions.values():  # compiles, and takes memory
            function()
        times = measure(functions, seconds, rounds=3)
        point = Point(direction, dtype, seqlen, *(times[name].median for name in BACKENDS))
        yield point
        won = won + 1 if point.won else 0
        if won == 2 or point.cpu + point.vulkan > LONGEST:
            return


def first(found: list[Point]) -> Crossover:
    """The smallest of the problems from which on Vulkan won every time; NEVER: it did not win the largest."""
    winning = NEVER
    for point in reversed(found):
        if not point.won:
            break
        winning = crossover.work(problem(point))
    return winning


def inputs(dtype: str, seqlen: int) -> Arrays:
    """q, k, v and dout of one sequence, unit normal."""
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  names the dtype
    draw = np.random.default_rng(seqlen).standard_normal
    shape = (1, seqlen, NHEADS, HEAD_DIM)
    return {name: draw(shape, np.float32).astype(dtype) for name in ("q", "k", "v", "dout")}


def calls(direction: str, given: Arrays) -> dict[str, Callable[[], Any]]:
    """Backend -> what is timed."""
    q, k, v, dout = (given[name] for name in ("q", "k", "v", "dout"))
    if direction == "forward":
        return {name: partial(api.attention_forward, q, k, v, backend=name) for name in BACKENDS}
    out, lse = api.attention_forward(q, k, v, backend="cpu")
    return {name: partial(api.attention_backward, dout, q, k, v, out, lse, backend=name) for name in BACKENDS}


def problem(point: Point) -> Problem:
    shape, lse = (1, point.seqlen, NHEADS, HEAD_DIM), (1, NHEADS, point.seqlen)
    described = dict.fromkeys(("q", "k", "v"), Array(shape, _strides(shape), point.dtype))
    if point.direction == "backward":
        described |= dict.fromkeys(("out", "dout"), described["q"]) | {"lse": Array(lse, _strides(lse), "float32")}
    return make_problem(described, Options())


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
