"""Which problems are worth their way to a GPU and back: measured by `anyattn tune`, a cautious guess before.

A problem is if it has enough of both: operations, which a GPU computes faster once there are many, and operations for
each byte that travels. Decoding has few of the latter, however long the cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config import settings, tuning_files
from ...definition.problem import Array, Problem

if TYPE_CHECKING:
    from pathlib import Path

    from .device import DeviceInfo

FILE = "vulkan-crossover.json"
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "bool": 1}


class Crossover(NamedTuple):
    """Work from which on a GPU is faster than the native engine: operations, and operations for each byte."""

    operations: float
    per_byte: float


CAUTIOUS = Crossover(1e11, 256.0)
NEVER = Crossover(math.inf, math.inf)
# (direction, dtype) -> crossover
Measured = Mapping[tuple[str, str], Crossover]


def work(problem: Problem) -> Crossover:
    """Operations of the forward pass where only the interval hides keys, in all and for each byte that travels."""
    interval, keys = problem.interval, problem.seqlen_k
    if interval.left is not None and interval.right is not None:
        keys = min(keys, max(interval.left + interval.right + 1, 0))
    if interval.chunk:
        keys = min(keys, interval.chunk)
    rows = math.prod(problem.q.shape[:-2]) * problem.nheads
    operations = 2.0 * rows * keys * (problem.head_dim + problem.head_dim_v)
    return Crossover(operations, operations / max(_bytes(problem), 1))


def _bytes(problem: Problem) -> int:
    """Of the large arrays, there and back."""
    inputs = _size(problem.q) + _size(problem.k) + _size(problem.v) + _size(problem.bias)
    out = math.prod(problem.out_shape) * ITEMSIZE[problem.dtype]
    forward = inputs + _size(problem.mask) + out
    return forward if problem.dout is None else forward + _size(problem.dout) + inputs


def _size(array: Array | None) -> int:
    return 0 if array is None else math.prod(array.shape) * ITEMSIZE[array.dtype]


def misses(problem: Problem, info: DeviceInfo | None = None) -> list[str]:
    """[] or why the problem is not worth the way to this device; None: to any, which asks no driver."""
    size, key = work(problem), ("forward" if problem.dout is None else "backward", problem.dtype)
    every = _load()
    if info is None:
        known = [CAUTIOUS, *(measured.get(key, CAUTIOUS) for measured in every.values())]
        needed = Crossover(*(min(column) for column in zip(*known, strict=True)))
    else:
        needed = of(info).get(key, CAUTIOUS)
    if size.operations < needed.operations:
        least = "no number of them pays" if needed == NEVER else f"{needed.operations:.2g} pay"
        return [f"{size.operations:.2g} operations are fewer than pay for the transfers: {least}"]
    if size.per_byte < needed.per_byte:
        return [f"{size.per_byte:.2g} operations for each byte do not pay for the transfers: {needed.per_byte:.2g} do"]
    return []


def describe(info: DeviceInfo) -> str:
    """From where on the automatic choice takes this device, for `anyattn info`."""
    if info.software and not settings.current().vulkan_software:
        return "never: it runs on the CPU, which the native engine uses better"
    measured = [f"{way} {dtype} {text(value)}" for (way, dtype), value in of(info).items()]
    return "; ".join(measured) or f"{text(CAUTIOUS)}; not measured: anyattn tune"


def text(crossover: Crossover) -> str:
    if crossover == NEVER:
        return "never"
    return f"from {crossover.operations:.2g} operations, {crossover.per_byte:.2g} for each byte"


def of(info: DeviceInfo) -> Measured:
    """What was measured on this device with this driver and processor; empty before."""
    return _load().get(_key(info), {})


def save(info: DeviceInfo, measured: Measured) -> Path:
    """Keeps what was measured, in place of what was.

    Raises:
        OSError: there is no cache folder, or it cannot be written.
    """
    every = {**_load(), _key(info): measured}
    return tuning_files.save(FILE, {name: as_json(entry) for name, entry in every.items()})


def as_json(measured: Measured) -> dict[str, Any]:
    """ "forward float32" -> [operations, operations for each byte], or null: never."""
    return {" ".join(key): None if value == NEVER else list(value) for key, value in measured.items()}


def _key(info: DeviceInfo) -> str:
    return f"{info.name}, driver {info.cache_key}, {os.cpu_count()} cores"


@cache
def _load() -> dict[str, Measured]:
    return tuning_files.load(FILE, _from_json)


def _from_json(entry: dict[str, Any]) -> Measured:
    found = {}
    for name, value in entry.items():
        direction, dtype = name.split()
        crossover = NEVER if value is None else Crossover(*map(float, value))
        if not all(number >= 0 for number in crossover):
            raise ValueError(f"{name} is {value}")
        found[direction, dtype] = crossover
    return found


settings.on_reload(_load.cache_clear)
