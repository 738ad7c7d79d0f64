"""Execution on an open device: memory, pipelines and commands, and the buffers of a call."""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import device as devices
from .api import VulkanError
from .arrays import Region, arranged, write
from .commands import Commands, Slice
from .device import Device
from .memory import Buffer, Memory
from .pipeline import Layout, Pipelines, linked
from .tuning import Config

T = TypeVar("T")
PUSH = struct.Struct("=8I")
SUBMIT_SECONDS = 0.1  # shorter than the watchdog of any system
FIRST_RATE = {"software": 1e9, "integrated": 5e10}  # operations per second until they are measured
DEFAULT_RATE = 3e11
DUMMY_BYTES = 256


class Engine:
    """Device with its memory, pipelines and command buffer."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory = Memory(device)
        self.layout = Layout(device)
        self.pipelines = Pipelines(device, self.layout)
        self.commands = Commands(device, self.layout)
        self.rate = FIRST_RATE.get(device.info.kind, DEFAULT_RATE)

    def run_alone(self, work: Callable[[], T]) -> T:
        """Call `work` while no other thread uses the device. The device is idle at the start.

        Raises:
            DeviceLost: the device is lost, or commands of an earlier call do not end.
            VulkanError: see `Device.run_alone`.
        """

        def work_when_idle() -> T:
            self.commands.settle()
            self.memory.reclaim()
            return work()

        return self.device.run_alone(work_when_idle)

    def run_job(self, work: Callable[[Job], T]) -> T:
        """Call `work` with a new job, which records and runs one call on the device.

        If an exception ends the job at any point, the device gets the time to finish.
        """

        def settled() -> T:
            try:
                return work(Job(self))
            except BaseException:
                with suppress(VulkanError):  # the device is lost then, and the first exception says more
                    self.commands.settle()
                raise

        return self.run_alone(settled)

    def pipeline(self, shader: str, config: Config) -> int:
        """Return the handle of a shader's pipeline."""
        return self.pipelines.get(
            config.module(shader),
            config.constants(),
            unroll=config.unroll,
            subgroup=config.subgroup,
            functions=linked(shader, config.score),
        )


_engines: dict[Device, Engine] = {}


def current_engine() -> Engine:
    """Return the engine of the current device.

    Raises:
        VulkanError: no device can compute.
    """
    device = devices.device()
    found = _engines.get(device)
    if found is None:
        found = device.run_alone(lambda: _engines.get(device) or _engines.setdefault(device, Engine(device)))
        for lost in [other for other in list(_engines) if other.lost]:
            _engines.pop(lost, None)
    return found


def release_memory() -> int:
    """Release the memory that is reserved for later calls on every Vulkan device; return the number of bytes.

    The memory of living `DeviceArray` objects is not released. The next call allocates what it needs again.

    Raises:
        anyattn.backends.vulkan.api.VulkanError: a device is lost, or this is called by a signal handler during a call.

    >>> from anyattn.vulkan import release_memory
    >>> release_memory() >= 0
    True
    """
    released = 0
    for engine in [engine for device, engine in list(_engines.items()) if not device.lost]:
        released += engine.run_alone(engine.memory.trim)
    return released


class DevicePlan(ABC):
    """Plan that outlives its device. After a loss, the newly opened device computes."""

    workspace_bytes = 0
    lse_optional = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def engine(self) -> Engine:
        if self._engine.device.lost:
            self._engine = current_engine()
        return self._engine

    @abstractmethod
    def shaders(self) -> dict[str, Config]:
        """Return the shaders that a call dispatches."""

    def warmup(self) -> None:
        engine = self.engine
        engine.run_alone(lambda: [engine.pipeline(shader, config) for shader, config in self.shaders().items()])


@dataclass(frozen=True, slots=True)
class Launch:
    """KV heads and sequences [first, first + count) that are bound and computed together."""

    heads: tuple[int, int]
    batches: tuple[int, int]
    whole: bool = False  # bindings cover every sequence of an array

    def part(self, region: Region, heads: int) -> tuple[int, int]:
        """Return (offset, bytes) in an array with `heads` heads per KV head."""
        first, count = self.heads
        return region.part((first * heads, count * heads), (0, region.shape[1]) if self.whole else self.batches)


class Job:
    """Call on the device, and the buffers that it uses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.commands = engine.commands
        self._buffers: list[Buffer] = []
        self._reads: list[tuple[Buffer, Region, npt.NDArray[Any]]] = []

    def buffer(self, size: int, *, staging: bool = False) -> Buffer:
        """Return a buffer that lives at least as long as the job."""
        taken = self.engine.memory.take(max(size, DUMMY_BYTES), staging=staging)
        self._buffers.append(taken)
        return taken

    def upload(self, name: str, region: Region, array: npt.NDArray[Any]) -> Buffer:
        """Return a buffer with the contents of a call's array."""
        target = self.buffer(region.nbytes)
        write(region, self.host(target, region.nbytes), arranged(name, array))
        return target

    def upload_bytes(self, data: bytes | npt.NDArray[Any]) -> Buffer:
        raw = np.frombuffer(data, np.uint8)
        target = self.buffer(raw.size)
        self.host(target, raw.size)[: raw.size] = raw
        return target

    def host(self, target: Buffer, size: int) -> npt.NDArray[np.uint8]:
        """Return mapped memory whose contents are copied to `target` before the first dispatch."""
        if target.host is not None:
            return target.host
        staging = self.buffer(size, staging=True)
        assert staging.host is not None
        self.commands.copy(staging, target, size)
        return staging.host

    def download(self, name: str, buffer: Buffer, region: Region, array: npt.NDArray[Any]) -> None:
        """Copy the buffer to a call's array when the job is finished."""
        if buffer.host is None:
            staging = self.buffer(region.nbytes, staging=True)
            self.commands.copy(buffer, staging, region.nbytes)
            buffer = staging
        self._reads.append((buffer, region, arranged(name, array)))

    def finish(self) -> None:
        """Wait for the device, then fill the arrays that are downloaded."""
        self.commands.finish()
        for buffer, region, array in self._reads:
            assert buffer.host is not None
            array[...] = region.view(buffer.host)
        self._reads.clear()

    def run(self, pipeline: int, launch: Launch, slices: Sequence[Slice], grid: Grid) -> None:
        """Dispatch the grid, in submissions of limited duration."""
        for first_block, blocks, first_unit, units in self._pieces(grid):
            push = PUSH.pack(
                *(first_block, first_unit, *launch.heads, launch.batches[0], grid.part_size, grid.parts, grid.part)
            )
            self.commands.dispatch(pipeline, slices, push, (blocks, units, grid.layers))
            self._pace(grid.operations * (blocks * units) / max(1, grid.blocks * grid.units))

    def _pieces(self, grid: Grid) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first block, blocks, first unit, units) of dispatches that take about SUBMIT_SECONDS each."""
        limits = self.engine.device.info.groups
        per_unit = grid.operations / max(1, grid.units)
        budget = self.engine.rate * SUBMIT_SECONDS
        units = max(1, min(int(budget / max(per_unit, 1.0)), limits[1]))
        blocks = limits[0]
        if units == 1 and per_unit > budget:
            blocks = min(blocks, max(1, int(grid.blocks * budget / per_unit)))
        for unit in range(0, grid.units, units):
            for block in range(0, grid.blocks, blocks):
                yield block, min(blocks, grid.blocks - block), unit, min(units, grid.units - unit)

    def _pace(self, operations: float) -> None:
        """Submit if enough work is recorded, and measure the speed of the device."""
        commands = self.commands
        commands.operations += operations
        if commands.operations < self.engine.rate * SUBMIT_SECONDS / 2:
            return
        done, start = commands.operations, time.perf_counter()
        commands.finish()
        measured = done / max(time.perf_counter() - start, 1e-6)
        # Increase the rate slowly, decrease it immediately.
        self.engine.rate = min(measured, 2 * self.engine.rate)


@dataclass(frozen=True, slots=True)
class Grid:
    """Workgroups of a launch: blocks of queries or keys, units (a KV head of a sequence), layers; and their work.

    The shader decides what a part is: split keys with workgroups of their own (layers), or dispatches that add to sums.
    """

    blocks: int
    units: int
    operations: float
    parts: int = 1
    part_size: int = 0
    layers: int = 1
    part: int = 0


def launches(
    regions: Mapping[str, Region],
    heads: Mapping[str, int],
    sizes: tuple[int, int],
    limit: int,
    whole: bool,
    scales: Mapping[str, int],
) -> list[Launch]:
    """Return ranges of (KV heads, sequences) whose arrays fit into bindings of `limit` bytes; [] if none do.

    heads: heads of an array per KV head. whole: sequences are not separate in memory. scales: factor by which an
    array's size grows.
    """
    nheads, batch = sizes[0], max(sizes[1], 1)
    tries = [(n, batch) for n in _halves(nheads)]
    tries += [] if whole else [(1, n) for n in _halves(batch)]
    for n_heads, n_batch in tries:
        largest = Launch((0, n_heads), (0, n_batch), whole)
        sizes_of = (largest.part(x, heads[name])[1] * scales.get(name, 1) for name, x in regions.items())
        if max(sizes_of, default=0) <= limit:
            return [
                Launch((h, min(n_heads, nheads - h)), (b, min(n_batch, sizes[1] - b)), whole)
                for h in range(0, nheads, n_heads)
                for b in range(0, batch, n_batch)
            ]
    return []


def _halves(n: int) -> list[int]:
    found = [max(n, 1)]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found
