"""Recording and execution of commands: copies, fills and dispatches, in order, each after the writes before it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

from ...config import settings
from . import api
from .api import COMPUTE_STAGE, DeviceLost, address, make, u32, u64
from .device import Device
from .device_info import STORAGE_BUFFERS
from .memory import Buffer
from .pipeline import PUSH_BYTES, Layout

SETS = 256  # dispatches in one submission
STORAGE_BUFFER = 7
COMPUTE_POINT = 1
ALL_COMMANDS = 0x10000
WRITES, READS_AND_WRITES, HOST_READS = 0x40 | 0x1000, 0x20 | 0x40 | 0x800 | 0x1000, 0x2000
COMPUTE_AND_TRANSFER, HOST_STAGE = 0x800 | 0x1000, 0x4000
WAIT_NS = 10**9

Slice = tuple[Buffer, int, int]  # buffer, offset and number of bytes bound to a shader


class Commands:
    """Command buffer of a device. It is not thread-safe: see `Engine.run_alone`."""

    def __init__(self, device: Device, layout: Layout) -> None:
        self.device, self.layout = device, layout
        self._functions()
        pool = device.create("vkCreateCommandPool", make(api.CommandPoolCreateInfo, flags=2, family=device.family))
        info = make(api.CommandBufferAllocateInfo, pool=pool, level=0, count=1)
        self._buffer = ctypes.c_void_p()
        allocate = device.function("vkAllocateCommandBuffers", *[ctypes.c_void_p] * 3)
        device.check(allocate(device.handle, address(info), address(self._buffer)), "vkAllocateCommandBuffers")
        self._fence = self._new_fence()
        self._sets = self._allocate_sets()
        self._used = 0
        self._recording = False  # recording or submitted, until `finish` or `settle` has ended
        self.operations = 0.0  # recorded and not yet run, counted by the caller
        self._prepare()

    def _functions(self) -> None:
        raw, of = ctypes.c_void_p, self.device.function
        self._begin_buffer = of("vkBeginCommandBuffer", raw, raw)
        self._reset_buffer = of("vkResetCommandBuffer", raw, u32)
        self._end_buffer = of("vkEndCommandBuffer", raw)
        self._bind_pipeline = of("vkCmdBindPipeline", raw, u32, u64, result=None)
        self._bind_sets = of("vkCmdBindDescriptorSets", raw, u32, u64, u32, u32, raw, u32, raw, result=None)
        self._push = of("vkCmdPushConstants", raw, u64, u32, u32, u32, raw, result=None)
        self._dispatch = of("vkCmdDispatch", raw, u32, u32, u32, result=None)
        self._copy = of("vkCmdCopyBuffer", raw, u64, u64, u32, raw, result=None)
        self._fill = of("vkCmdFillBuffer", raw, u64, u64, u64, u32, result=None)
        self._barrier = of("vkCmdPipelineBarrier", raw, u32, u32, u32, u32, raw, u32, raw, u32, raw, result=None)
        self._update = of("vkUpdateDescriptorSets", raw, u32, raw, u32, raw, result=None)
        self._submit = of("vkQueueSubmit", raw, u32, raw, u64)
        self._wait = of("vkWaitForFences", raw, u32, raw, u32, u64)
        self._reset = of("vkResetFences", raw, u32, raw)

    def _allocate_sets(self) -> Any:
        sizes = api.PoolSize(STORAGE_BUFFER, SETS * STORAGE_BUFFERS)
        info = make(api.DescriptorPoolCreateInfo, max_sets=SETS, n_sizes=1, sizes=address(sizes))
        pool = self.device.create("vkCreateDescriptorPool", info)
        layouts = (u64 * SETS)(*[self.layout.set_layout] * SETS)
        request = make(api.SetAllocateInfo, pool=pool, count=SETS, layouts=address(layouts))
        sets = (u64 * SETS)()
        allocate = self.device.function("vkAllocateDescriptorSets", *[ctypes.c_void_p] * 3)
        self.device.check(allocate(self.device.handle, address(request), address(sets)), "vkAllocateDescriptorSets")
        return sets

    def _prepare(self) -> None:
        """Build the structures that every call fills in."""
        self._infos = (api.BufferInfo * STORAGE_BUFFERS)()
        self._writes = (api.WriteSet * STORAGE_BUFFERS)(
            *[make(api.WriteSet, binding=i, count=1, type=STORAGE_BUFFER) for i in range(STORAGE_BUFFERS)]
        )
        for i in range(STORAGE_BUFFERS):
            self._writes[i].buffers = address(self._infos) + i * ctypes.sizeof(api.BufferInfo)
        self._begin_info = make(api.BeginInfo, flags=1)
        self._between = make(api.MemoryBarrier, source=WRITES, target=READS_AND_WRITES)
        self._at_end = make(api.MemoryBarrier, source=WRITES, target=HOST_READS)
        self._submit_info = make(api.SubmitInfo, n_commands=1, commands=address(self._buffer))

    def dispatch(self, pipeline: int, slices: Sequence[Slice], push: bytes, groups: tuple[int, int, int]) -> None:
        """Dispatch `groups` workgroups; slice i is bound to binding i."""
        if self._used == SETS:
            self.finish()
        self._start()
        device, set_index = self.device, self._used
        self._used += 1
        for binding in range(STORAGE_BUFFERS):  # all of them, because the layout declares each
            buffer, offset, size = slices[min(binding, len(slices) - 1)]
            self._infos[binding] = (buffer.handle, offset, size)
            self._writes[binding].set = self._sets[set_index]
        self._update(device.handle, STORAGE_BUFFERS, address(self._writes), 0, None)
        self._bind_pipeline(self._buffer, COMPUTE_POINT, pipeline)
        at = address(self._sets) + 8 * set_index
        self._bind_sets(self._buffer, COMPUTE_POINT, self.layout.handle, 0, 1, at, 0, None)
        assert len(push) == PUSH_BYTES
        self._push(self._buffer, self.layout.handle, COMPUTE_STAGE, 0, PUSH_BYTES, push)
        self._dispatch(self._buffer, *groups)

    def copy(self, source: Buffer, target: Buffer, size: int) -> None:
        if size:
            self._start()
            region = api.BufferCopy(0, 0, size)
            self._copy(self._buffer, source.handle, target.handle, 1, address(region))

    def fill(self, target: Buffer, size: int, word: int) -> None:
        """Fill the first `size` bytes, a multiple of 4, with a 32-bit word."""
        if size:
            self._start()
            self._fill(self._buffer, target.handle, 0, size, word)

    def barrier(self) -> None:
        """Make the commands before visible to the commands after."""
        self._start()
        stage, at = COMPUTE_AND_TRANSFER, address(self._between)
        self._barrier(self._buffer, stage, stage, 0, 1, at, 0, None, 0, None)

    def finish(self) -> None:
        """Submit the recorded commands and wait for them.

        Raises:
            DeviceLost: the device was lost, or did not answer within ANYATTN_VULKAN_TIMEOUT seconds.
        """
        if not self._recording:
            return
        stages, at = (COMPUTE_AND_TRANSFER, HOST_STAGE), address(self._at_end)
        self._barrier(self._buffer, *stages, 0, 1, at, 0, None, 0, None)
        device = self.device
        device.check(self._end_buffer(self._buffer), "vkEndCommandBuffer")
        device.check(self._submit(device.queue, 1, address(self._submit_info), self._fence), "vkQueueSubmit")
        self._wait_for(self._fence)
        device.instance.check_messages()
        self._begin_anew()

    def settle(self) -> None:
        """Wait until the device is idle, and discard what was recorded since the last successful `finish`.

        After an exception in a job, even inside this function, calling it makes the next job safe.

        Raises:
            DeviceLost: the device is lost, or did not answer within ANYATTN_VULKAN_TIMEOUT seconds.
        """
        if not self._recording or self.device.lost:
            return
        device, fence = self.device, self._new_fence()
        # Only the fence: it is signalled after everything that was submitted before.
        device.check(self._submit(device.queue, 0, None, fence), "vkQueueSubmit")
        self._wait_for(fence)
        device.destroy("vkDestroyFence", fence.value)
        device.check(self._reset_buffer(self._buffer, 0), "vkResetCommandBuffer")
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Accept commands again. The device must be idle."""
        self.device.check(self._reset(self.device.handle, 1, address(self._fence)), "vkResetFences")
        self._used, self.operations, self._recording = 0, 0.0, False

    def _start(self) -> None:
        if not self._recording:
            self._recording = True
            self.device.check(self._begin_buffer(self._buffer, address(self._begin_info)), "vkBeginCommandBuffer")

    def _new_fence(self) -> Any:
        return u64(self.device.create("vkCreateFence", make(api.FenceCreateInfo)))

    def _wait_for(self, fence: Any) -> None:
        limit = settings.current().vulkan_timeout
        end = time.monotonic() + limit
        while True:
            result = self._wait(self.device.handle, 1, address(fence), 1, WAIT_NS)
            if result != api.TIMEOUT:
                break
            if time.monotonic() > end:
                self.device.lost = f"{self.device.info.name} did not answer within {limit} s (ANYATTN_VULKAN_TIMEOUT)"
                raise DeviceLost(self.device.lost, api.TIMEOUT)
        self.device.check(result, "vkWaitForFences")
