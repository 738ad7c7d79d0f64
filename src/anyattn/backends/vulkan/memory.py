"""Buffers on a device: mapped where device and host share memory, else with a mapped one next to them for transfers.

Whoever holds a `Buffer` owns its memory. When the last reference to it dies, the memory is noted as returned, and a
later call gets it once the device is known to be idle. So an exception at any point of a call neither loses memory
nor hands out what the device still uses.
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
    """A storage buffer. `host`: its bytes as NumPy sees them, None where the host cannot."""

    __slots__ = ("__weakref__", "handle", "host", "size")

    def __init__(self, allocation: Allocation) -> None:
        self.handle, self.size, self.host = allocation.handle, allocation.size, allocation.host


@dataclass(eq=False, slots=True)
class Allocation:
    """A buffer of the device with its memory. It is handed out only while nobody has a lease on it."""

    handle: int
    memory: int
    size: int
    host: Bytes | None
    staging: bool
    lease: Lease | None = None

    def is_free(self) -> bool:
        """Return whether it may be handed out. Lists of free ones may name others, where an exception came between."""
        return self.lease is None and self.handle != 0


class Lease(weakref.ref[Buffer]):
    """The use of an allocation through a `Buffer`, which ends when the buffer dies. Compared by identity."""

    allocation: Allocation | None = None
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Memory:
    """Hands out buffers; those that nobody holds any more are kept, by size, for the next call.

    Not for several threads: see `Engine.run_alone`.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        types = device.memory.types[: device.memory.n_types]
        self.unified = any(kind.flags & SHARED == SHARED for kind in types)
        self._free: dict[tuple[int, bool], list[Allocation]] = defaultdict(list)
        self._leases: set[Lease] = set()  # reachable from here, so that the garbage collector calls back
        self._returned: list[Lease] = []  # leases whose buffers have died, in order
        handle, raw = ctypes.c_void_p, ctypes.c_void_p
        self._requirements = device.function("vkGetBufferMemoryRequirements", handle, api.u64, raw, result=None)
        self._bind = device.function("vkBindBufferMemory", handle, api.u64, api.u64, api.u64)
        self._map = device.function("vkMapMemory", handle, api.u64, api.u64, api.u64, api.u32, raw)

    @property
    def kept(self) -> int:
        """Return the bytes that no buffer uses."""
        free = {one for kept in self._free.values() for one in kept if one.is_free()}
        returned = {lease.allocation for lease in self._returned.copy() if lease.allocation}
        return sum(one.size for one in free | returned)

    def take(self, size: int, *, staging: bool = False) -> Buffer:
        """Return a buffer of at least so many bytes with any contents; `staging` ones are always mapped.

        Raises:
            DeviceMemoryError: the device has no room, even after those kept were given back to it.
        """
        rounded, staging = _size_class(size), staging and not self.unified
        free = self._free[rounded, staging]
        while free and not free[-1].is_free():
            free.pop()
        if not free:
            free.append(self._allocate(rounded, staging))
        buffer = Buffer(free[-1])
        lease = Lease(buffer, self._returned.append)  # a function of C: no exception can come in its middle
        lease.allocation = free[-1]
        self._leases.add(lease)
        free[-1].lease = lease
        free.pop()
        return buffer

    def reclaim(self) -> None:
        """Keep the memory of dead buffers for the next call. The device must be idle."""
        while self._returned:
            # An exception may come between any two steps, which are then repeated: see `is_free`.
            lease = self._returned[0]
            allocation = lease.allocation
            if allocation and allocation.lease is lease:
                self._free[allocation.size, allocation.staging].append(allocation)
                allocation.lease = None
            self._leases.discard(lease)
            self._returned.pop(0)

    def trim(self) -> int:
        """Give everything that is kept back to the device; return the bytes. The device must be idle."""
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
                f"{size} bytes are more than {device.info.name} allocates: {device.info.allocation}"
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
        """Return the first memory type that suits, best wish first."""
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
        self.device.destroy("vkFreeMemory", memory)  # 0, where there is none, is accepted


def _size_class(size: int) -> int:
    """Return the size rounded up to a multiple of an eighth of its power of two: little waste, few sizes to keep."""
    size = max(size, SMALLEST)
    step = max(SMALLEST, 1 << (size.bit_length() - 4))
    return -(-size // step) * step
