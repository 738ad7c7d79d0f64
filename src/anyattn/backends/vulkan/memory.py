"""Buffers on a device: mapped where device and host share memory, else with a mapped one beside them for transfers."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition.errors import DeviceMemoryError
from . import api
from .api import OUT_OF_DEVICE_MEMORY, OUT_OF_HOST_MEMORY, VulkanError, address, make
from .device import Device

DEVICE_LOCAL, VISIBLE, COHERENT, CACHED = 1, 2, 4, 8
SHARED = DEVICE_LOCAL | VISIBLE | COHERENT | CACHED
USAGE = 0x23  # transfer source and target, storage buffer
SMALLEST = 4096
WHOLE = 0xFFFFFFFFFFFFFFFF

Bytes = npt.NDArray[np.uint8]


@dataclass(eq=False, slots=True)
class Buffer:
    """A storage buffer. `host`: its bytes as NumPy sees them, None where the host cannot."""

    handle: int
    memory: int
    size: int
    host: Bytes | None


class Memory:
    """Hands out buffers and takes them back: those given back are kept, by size, for the next call."""

    def __init__(self, device: Device) -> None:
        self.device = device
        types = device.memory.types[: device.memory.n_types]
        self.unified = any(kind.flags & SHARED == SHARED for kind in types)
        self.kept = 0  # bytes
        self._free: dict[tuple[int, bool], list[Buffer]] = defaultdict(list)
        handle, raw = ctypes.c_void_p, ctypes.c_void_p
        self._requirements = device.function("vkGetBufferMemoryRequirements", handle, api.u64, raw, result=None)
        self._bind = device.function("vkBindBufferMemory", handle, api.u64, api.u64, api.u64)
        self._map = device.function("vkMapMemory", handle, api.u64, api.u64, api.u64, api.u32, raw)

    def take(self, size: int, *, staging: bool = False) -> Buffer:
        """A buffer of at least so many bytes with any contents; `staging` ones are always mapped.

        Raises:
            DeviceMemoryError: the device has no room, even after those kept were given back to it.
        """
        rounded, staging = _size_class(size), staging and not self.unified
        free = self._free[rounded, staging]
        if free:
            self.kept -= rounded
            return free.pop()
        try:
            return self._new(rounded, staging)
        except VulkanError as error:
            if error.result not in (OUT_OF_DEVICE_MEMORY, OUT_OF_HOST_MEMORY):
                raise
        self.trim()
        try:
            return self._new(rounded, staging)
        except VulkanError as error:
            raise DeviceMemoryError(f"no memory for {rounded} bytes on {self.device.info.name}: {error}") from error

    def give(self, buffer: Buffer, *, staging: bool = False) -> None:
        """Takes a buffer back; nothing may use it any more."""
        self.kept += buffer.size
        self._free[buffer.size, staging and not self.unified].append(buffer)

    def trim(self) -> None:
        """Gives every kept buffer back to the device."""
        for buffers in self._free.values():
            while buffers:
                self._destroy(buffers.pop())
        self.kept = 0

    def _new(self, size: int, staging: bool) -> Buffer:
        device = self.device
        if size > device.info.allocation:
            raise DeviceMemoryError(
                f"{size} bytes are more than {device.info.name} allocates: {device.info.allocation}"
            )
        handle = device.create("vkCreateBuffer", make(api.BufferCreateInfo, size=size, usage=USAGE))
        memory = 0
        try:
            needs = api.MemoryRequirements()
            self._requirements(device.handle, handle, address(needs))
            mapped = self.unified or staging
            info = make(api.MemoryAllocateInfo, size=needs.size, type=self._type(needs.types, staging))
            memory = device.create("vkAllocateMemory", info)
            device.check(self._bind(device.handle, handle, memory, 0), "vkBindBufferMemory")
            return Buffer(handle, memory, size, self._view(memory, size) if mapped else None)
        except VulkanError:
            self._destroy(Buffer(handle, memory, size, None))
            raise

    def _view(self, memory: int, size: int) -> Bytes:
        at = ctypes.c_void_p()
        self.device.check(self._map(self.device.handle, memory, 0, WHOLE, 0, address(at)), "vkMapMemory")
        whole: Any = (ctypes.c_uint8 * size).from_address(at.value or 0)
        return np.frombuffer(whole, np.uint8)

    def _type(self, allowed: int, staging: bool) -> int:
        """The first memory type that suits: best wish first."""
        wishes: tuple[int, ...] = (DEVICE_LOCAL, 0)
        if self.unified:
            wishes = (SHARED,)
        elif staging:
            wishes = (VISIBLE | COHERENT | CACHED, VISIBLE | COHERENT)
        types = self.device.memory.types[: self.device.memory.n_types]
        for wish in wishes:
            for index, kind in enumerate(types):
                if allowed >> index & 1 and kind.flags & wish == wish:
                    return index
        raise VulkanError(f"{self.device.info.name} has no memory type for a storage buffer")

    def _destroy(self, buffer: Buffer) -> None:
        self.device.destroy("vkDestroyBuffer", buffer.handle)
        if buffer.memory:
            self.device.destroy("vkFreeMemory", buffer.memory)


def _size_class(size: int) -> int:
    """The size rounded up to a multiple of an eighth of its power of two: little waste, and few sizes to keep."""
    size = max(size, SMALLEST)
    step = max(SMALLEST, 1 << (size.bit_length() - 4))
    return -(-size // step) * step
