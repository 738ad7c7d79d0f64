"""Decide whether a problem in host memory is large enough to offload to a GPU, transfers included.

A problem qualifies if its operations, and its operations for each transferred byte, reach a threshold. `anyattn tune`
measures the thresholds of a device; until then a cautious default applies. Decoding rarely qualifies, because it has
few operations for each byte, however long the cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...config import settings, tuning_files
from ...definition.dtypes import DTYPES
from ...definition.passes import FORWARD
from ...definition.problem import Array, Problem

if TYPE_CHECKING:
    from pathlib import Path

FILE = "vulkan-crossover.json"


class Work(NamedTuple):
    """Amount of work: operations, and operations per transferred byte. As a threshold, the least work to offload."""

    operations: float
    per_byte: float


class Described(Protocol):
    """Device properties that decide about offloading, available without its driver: a `DeviceInfo` or a `Report`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def cache_key(self) -> str: ...


DEFAULT = Work(1e11, 256.0)  # cautious default for devices whose kind is in TRUSTED_KINDS
TRUSTED_KINDS = ("discrete", "software")  # other kinds may be slower than the CPU whose memory they share
NEVER = Work(math.inf, math.inf)
# (direction, dtype) -> the least work to offload
Thresholds = Mapping[tuple[str, str], Work]


def work(problem: Problem) -> Work:
    """Return the work of the forward pass, as if only the interval masked keys."""
    interval, keys = problem.interval, problem.seqlen_k
    if interval.left is not None and interval.right is not None:
        keys = min(keys, max(interval.left + interval.right + 1, 0))
    if interval.chunk:
        keys = min(keys, interval.chunk)
    rows = math.prod(problem.q.shape[:-2]) * problem.nheads
    operations = 2.0 * rows * keys * (problem.head_dim + problem.head_dim_v)
    return Work(operations, operations / max(_bytes(problem), 1))


def _bytes(problem: Problem) -> int:
    """Return the bytes of the large arrays that are transferred, in both directions."""
    inputs = _size(problem.q) + _size(problem.k) + _size(problem.v) + _size(problem.bias)
    out = math.prod(problem.out_shape) * DTYPES[problem.dtype].itemsize
    forward = inputs + _size(problem.mask) + out
    return forward if problem.pass_ is FORWARD else forward + _size(problem.dout) + inputs


def _size(array: Array | None) -> int:
    return 0 if array is None else math.prod(array.shape) * DTYPES[array.dtype].itemsize


def reasons_to_stay(problem: Problem, device: Described | None = None) -> list[str]:
    """Return why the problem is too small to offload to this device, or []. None: any device, without its driver."""
    size, key = work(problem), (problem.pass_.name, problem.dtype)
    every = _load()
    if device is None:
        known = [DEFAULT, *(tuned.get(key, DEFAULT) for tuned in every.values())]
        needed = Work(*(min(column) for column in zip(*known, strict=True)))
    else:
        tuned = tuned_thresholds(device)
        if key not in tuned and device.kind not in TRUSTED_KINDS:
            return [f"{device.name} is an unmeasured {device.kind} GPU: run `anyattn tune`, or name the backend"]
        needed = tuned.get(key, DEFAULT)
    if size.operations < needed.operations:
        least = "offloading never pays" if needed == NEVER else f"at least {needed.operations:.2g} are needed"
        return [f"{size.operations:.2g} operations do not pay for the transfers: {least}"]
    if size.per_byte < needed.per_byte:
        least = f"at least {needed.per_byte:.2g} are needed"
        return [f"{size.per_byte:.2g} operations per byte do not pay for the transfers: {least}"]
    return []


def describe(device: Described) -> str:
    """Return the thresholds of automatic choice for this device as text, for `anyattn info`."""
    if device.kind == "software" and not settings.current().vulkan_software:
        return "never, because it is a software driver and the cpu backend is faster"
    tuned = [f"{way} {dtype} {text(value)}" for (way, dtype), value in tuned_thresholds(device).items()]
    default = text(DEFAULT if device.kind in TRUSTED_KINDS else NEVER)
    return "; ".join(tuned) or f"{default}; not measured: anyattn tune"


def text(threshold: Work) -> str:
    """Return a threshold as text."""
    if threshold == NEVER:
        return "never"
    return f"from {threshold.operations:.2g} operations, {threshold.per_byte:.2g} per byte"


def tuned_thresholds(device: Described) -> Thresholds:
    """Return the tuned thresholds of this device, driver and processor; empty if there are none."""
    return _load().get(_key(device), {})


def save_thresholds(device: Described, thresholds: Thresholds) -> Path:
    """Write the tuned thresholds of a device to the cache folder, replacing earlier ones.

    Raises:
        OSError: the cache folder does not exist or cannot be written.
    """
    every = {**_load(), _key(device): thresholds}
    return tuning_files.save(FILE, {name: as_json(entry) for name, entry in every.items()})


def as_json(thresholds: Thresholds) -> dict[str, Any]:
    """Return "forward float32" -> [operations, operations per byte], or null for never."""
    return {" ".join(key): None if value == NEVER else list(value) for key, value in thresholds.items()}


def _key(device: Described) -> str:
    return f"{device.name}, driver {device.cache_key}, {os.cpu_count()} cores"


@cache
def _load() -> dict[str, Thresholds]:
    """Return the tuned thresholds by device, driver and processor."""
    return tuning_files.load(FILE, _from_json)


def _from_json(entry: dict[str, Any]) -> Thresholds:
    found = {}
    for name, value in entry.items():
        direction, dtype = name.split()
        threshold = NEVER if value is None else Work(*map(float, value))
        if not all(number >= 0 for number in threshold):
            raise ValueError(f"{name} must be a threshold, got {value}")
        found[direction, dtype] = threshold
    return found


settings.on_reload(_load.cache_clear)
