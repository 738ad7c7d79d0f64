"""Buffers on a device: mapped if device and host share memory, else with a mapped buffer for transfers.

The holder of a `Buffer` owns its memory. When the last reference is gone, the memory is recorded as returned, and a
later call reuses it once the device is known to be idle. An exception at any point of a call therefore neither leaks
memory nor reuses memory that the device still accesses.
"""

from __future__ import annotations

import ctypes
import weakref
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


class Buffer:
    """Storage buffer. host: its bytes as a NumPy array, or None if the host cannot access them."""

    __slots__ = ("__weakref__", "handle", "host", "size")

    def __init__(self, allocation: Allocation) -> None:
        self.handle, self.size, self.host = allocation.handle, allocation.size, allocation.host


@dataclass(eq=False, slots=True)
class Allocation:
    """Buffer of the device with its memory. It can be taken only if no lease on it exists."""

    handle: int
    memory: int
    size: int
    host: Bytes | None
    staging: bool
    lease: Lease | None = None

    def is_free(self) -> bool:
        """Return whether it can be taken. After an exception, a list of free allocations may contain others."""
        return self.lease is None and self.handle != 0


class Lease(weakref.ref[Buffer]):
    """Use of an allocation through a `Buffer`, which ends when the buffer is deleted. Compared by identity."""

    allocation: Allocation | None = None
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Memory:
    """Allocator of buffers. Unused buffers are stored by size for the next call.

    It is not thread-safe: see `Engine.run_alone`.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        types = device.memory.types[: device.memory.n_types]
        self.unified = any(kind.flags & SHARED == SHARED for kind in types)
        self._free: dict[tuple[int, bool], list[Allocation]] = defaultdict(list)
        self._leases: set[Lease] = set()  # reachable from here, so that the garbage collector calls back
        self._returned: list[Lease] = []  # leases whose buffers were deleted, in order
        handle, raw = ctypes.c_void_p, ctypes.c_void_p
        self._requirements = device.function("vkGetBufferMemoryRequirements", handle, api.u64, raw, result=None)
        self._bind = device.function("vkBindBufferMemory", handle, api.u64, api.u64, api.u64)
        self._map = device.function("vkMapMemory", handle, api.u64, api.u64, api.u64, api.u32, raw)

    @property
    def kept(self) -> int:
        """Return the number of bytes that no buffer uses."""
        free = {one for kept in self._free.values() for one in kept if one.is_free()}
        returned = {lease.allocation for lease in self._returned.copy() if lease.allocation}
        return sum(one.size for one in free | returned)

    def take(self, size: int, *, staging: bool = False) -> Buffer:
        """Return a buffer of at least `size` bytes with any contents. `staging` buffers are always mapped.

        Raises:
            DeviceMemoryError: the device has not enough memory, even after the stored buffers were released.
        """
        rounded, staging = _size_class(size), staging and not self.unified
        free = self._free[rounded, staging]
        while free and not free[-1].is_free():
            free.pop()
        if not free:
            free.append(self._allocate(rounded, staging))
        buffer = Buffer(free[-1])
        lease = Lease(buffer, self._returned.append)  # a C function, which no exception can interrupt
        lease.allocation = free[-1]
        self._leases.add(lease)
        free[-1].lease = lease
        free.pop()
        return buffer

    def reclaim(self) -> None:
        """Store the memory of deleted buffers for the next call. The device must be idle."""
        while self._returned:
            # An exception may interrupt any step, which is then repeated: see `is_free`.
            lease = self._returned[0]
            allocation = lease.allocation
            if allocation and allocation.lease is lease:
                self._free[allocation.size, allocation.staging].append(allocation)
                allocation.lease = None
            self._leases.discard(lease)
            self._returned.pop(0)

    def trim(self) -> int:
        """Release all stored memory; return the number of bytes. The device must be idle."""
        self.reclaim()
        bytes_kept = self.kept
        for free in self._free.values():
            while free:
                allocation = free.pop()
                if allocation.is_free():
                    self._destroy(allocation)
        return bytes_kept

    def _allocate(self, size: int, staging: bool) -> Allocation:
        try:
            return self._new(size, staging)
        except VulkanError as error:
            if error.result not in (OUT_OF_DEVICE_MEMORY, OUT_OF_HOST_MEMORY):
                raise
        self.trim()
        try:
            return self._new(size, staging)
        except VulkanError as error:
            raise DeviceMemoryError(f"no memory for {size} bytes on {self.device.info.name}: {error}") from error

    def _new(self, size: int, staging: bool) -> Allocation:
        device = self.device
        if size > device.info.allocation:
            raise DeviceMemoryError(
                f"no memory for {size} bytes on {device.info.name}, which allocates at most {device.info.allocation}"
            )
        handle = device.create("vkCreateBuffer", make(api.BufferCreateInfo, size=size, usage=USAGE))
        made = Allocation(handle, 0, size, None, staging)
        try:
            needs = api.MemoryRequirements()
            self._requirements(device.handle, made.handle, address(needs))
            info = make(api.MemoryAllocateInfo, size=needs.size, type=self._type(needs.types, staging))
            made.memory = device.create("vkAllocateMemory", info)
            device.check(self._bind(device.handle, made.handle, made.memory, 0), "vkBindBufferMemory")
            if self.unified or staging:
                made.host = self._view(made.memory, size)
        except BaseException:
            self._destroy(made)
            raise
        return made

    def _view(self, memory: int, size: int) -> Bytes:
        at = ctypes.c_void_p()
        self.device.check(self._map(self.device.handle, memory, 0, WHOLE, 0, address(at)), "vkMapMemory")
        whole: Any = (ctypes.c_uint8 * size).from_address(at.value or 0)
        return np.frombuffer(whole, np.uint8)

    def _type(self, allowed: int, staging: bool) -> int:
        """Return the best memory type that is allowed."""
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

    def _destroy(self, allocation: Allocation) -> None:
        handle, memory = allocation.handle, allocation.memory
        allocation.handle = allocation.memory = 0
        self.device.destroy("vkDestroyBuffer", handle)
        self.device.destroy("vkFreeMemory", memory)  # accepts 0 if there is none


def _size_class(size: int) -> int:
    """Return the size rounded up to a multiple of an eighth of its power of two: little waste, few different sizes."""
    size = max(size, SMALLEST)
    step = max(SMALLEST, 1 << (size.bit_length() - 4))
    return -(-size // step) * step
