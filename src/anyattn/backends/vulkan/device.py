"""Vulkan devices: their list, their descriptions, and the open device that computes."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from functools import cached_property
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakSet

from ...config import settings
from . import api, first_contact, matrices
from .api import COMPUTE_STAGE, SHUFFLE, DeviceLost, VulkanError, address, check, make, u32
from .device_info import KINDS, DeviceInfo

API_VERSION = (1 << 22) | (1 << 12)  # 1.1, the oldest supported version
HIGHEST_API = (1 << 22) | (3 << 12)
T = TypeVar("T")
COMPUTE_QUEUE, GRAPHICS_QUEUE = 2, 1
DEVICE_LOCAL_HEAP = 1
PORTABILITY = "VK_KHR_portability_subset"
PORTABILITY_ENUMERATION = b"VK_KHR_portability_enumeration"
DEBUG_UTILS = b"VK_EXT_debug_utils"
WARNINGS_AND_ERRORS, EVERY_KIND = 0x1100, 7
VALIDATION = b"VK_LAYER_KHRONOS_validation"


class Instance:
    """Vulkan instance and its devices."""

    def __init__(self) -> None:
        self.messages: list[str] = []  # messages of the validation layer
        validate = settings.current().vulkan_validate
        application = make(api.ApplicationInfo, name=b"anyattn", engine=b"anyattn", api=HIGHEST_API)
        extensions = [*self._portability(), *([DEBUG_UTILS] if validate else [])]
        names = (ctypes.c_char_p * max(1, len(extensions)))(*extensions)
        layers = (ctypes.c_char_p * 1)(VALIDATION)
        info = make(
            api.InstanceCreateInfo,
            flags=1 if PORTABILITY_ENUMERATION in extensions else 0,
            application=address(application),
            n_layers=1 if validate else 0,
            layers=ctypes.cast(layers, ctypes.c_void_p),
            n_extensions=len(extensions),
            extensions=ctypes.cast(names, ctypes.c_void_p),
        )
        self.handle = ctypes.c_void_p()
        create = api.global_function("vkCreateInstance", *[ctypes.c_void_p] * 3)
        check(create(address(info), None, address(self.handle)), "vkCreateInstance")
        if validate:
            self._listen()
        function = self.function("vkEnumeratePhysicalDevices", *[ctypes.c_void_p] * 3)
        self._physical = [ctypes.c_void_p(x) for x in api.enumerate_all(function, ctypes.c_void_p, self.handle)]

    def function(self, name: str, *arguments: Any, result: Any = api.i32) -> Any:
        return api.instance_function(self.handle, name, *arguments, result=result)

    def physical(self, index: int) -> Any:
        return self._physical[index]

    @cached_property
    def devices(self) -> tuple[DeviceInfo, ...]:
        return tuple(self._describe(index) for index in range(len(self._physical)))

    def choose(self) -> DeviceInfo:
        """Return the device that the settings name, or the best by `DeviceInfo.rank`.

        Raises:
            VulkanError: there is no device.
        """
        if not self.devices:
            raise VulkanError("Vulkan is installed, but no driver has a device")
        wanted = settings.current().vulkan_device
        if wanted:
            found = [x for x in self.devices if wanted == str(x.index) or wanted.lower() in x.name.lower()]
            if not found:
                names = ", ".join(f"{x.index}: {x.name}" for x in self.devices)
                raise VulkanError(f"ANYATTN_VULKAN_DEVICE must be one of {names}, got {wanted!r}")
            return found[0]
        return min(self.devices, key=DeviceInfo.rank)

    @staticmethod
    def _portability() -> list[bytes]:
        """Return the extensions that make Vulkan list drivers on top of another API (MoltenVK)."""
        function = api.global_function("vkEnumerateInstanceExtensionProperties", api.char_p, *[ctypes.c_void_p] * 2)
        names = {x.name for x in api.enumerate_all(function, api.Extension, None)}
        return [x for x in (PORTABILITY_ENUMERATION,) if x in names]

    def _listen(self) -> None:
        """Collect errors and warnings of the validation layer in `messages`."""

        def note(severity: int, kinds: int, message: int, user: int) -> int:
            self.messages.append(api.DebugMessage.from_address(message).text.decode(errors="replace"))
            return 0

        self._callback = api.DEBUG_CALLBACK(note)
        info = make(
            api.DebugMessengerCreateInfo, severities=WARNINGS_AND_ERRORS, kinds=EVERY_KIND, callback=self._callback
        )
        create = self.function("vkCreateDebugUtilsMessengerEXT", *[ctypes.c_void_p] * 4)
        handle = api.u64()
        check(create(self.handle, address(info), None, address(handle)), "vkCreateDebugUtilsMessengerEXT")

    def check_messages(self) -> None:
        """Raise VulkanError with the messages of the validation layer, if there are any."""
        if self.messages:
            found, self.messages = self.messages, []
            raise VulkanError("\n".join(["the validation layer reports:", *found]))

    def _describe(self, index: int) -> DeviceInfo:
        physical = self._physical[index]
        subgroup, maintenance = make(api.SubgroupProperties), make(api.Maintenance3Properties)
        driver, both = make(api.DriverProperties), make(api.Properties2)
        both.pNext, subgroup.pNext, maintenance.pNext = address(subgroup), address(maintenance), address(driver)
        properties = both.properties
        simple = self.function("vkGetPhysicalDeviceProperties", *[ctypes.c_void_p] * 2, result=None)
        simple(physical, address(properties))
        if properties.api >= API_VERSION:
            function = self.function("vkGetPhysicalDeviceProperties2", *[ctypes.c_void_p] * 2, result=None)
            function(physical, address(both))
        limits, raw, extensions = properties.limits, properties.api, self._extensions(physical)
        version = (raw >> 22 & 0x7F, raw >> 12 & 0x3FF, raw & 0xFFF)
        shuffle = bool(subgroup.operations & SHUFFLE and subgroup.stages & COMPUTE_STAGE)
        text = f"{driver.name.decode()} {driver.info.decode()}".strip()
        return DeviceInfo(
            index=index,
            name=properties.name.decode(errors="replace"),
            kind=KINDS.get(properties.type, "other"),
            api=version,
            driver=text or hex(properties.driver),
            subgroup=subgroup.size,
            shuffle=shuffle,
            storage_range=limits.maxStorageBufferRange,
            allocation=maintenance.allocation or 2**30,
            alignment=limits.minStorageBufferOffsetAlignment,
            shared_memory=limits.maxComputeSharedMemorySize,
            invocations=min(limits.maxComputeWorkGroupInvocations, limits.group_size[0]),
            groups=(limits.groups_x, limits.groups_y, limits.groups_z),
            cache_key=f"{bytes(properties.cache_uuid).hex()}-{properties.driver:x}",
            extensions=extensions,
            matrices=matrices.query(self.function, physical, version, extensions),
            storage_buffers=limits.maxPerStageDescriptorStorageBuffers,
            memory=max((heap.size for heap in self._heaps(physical) if heap.flags & DEVICE_LOCAL_HEAP), default=0),
        )

    def memory(self, physical: Any) -> Any:
        """Return the memory types and heaps of a device."""
        found = api.MemoryProperties()
        query = self.function("vkGetPhysicalDeviceMemoryProperties", *[ctypes.c_void_p] * 2, result=None)
        query(physical, address(found))
        return found

    def _heaps(self, physical: Any) -> Any:
        found = self.memory(physical)
        return found.heaps[: found.n_heaps]

    def _extensions(self, physical: Any) -> frozenset[str]:
        arguments = (ctypes.c_void_p, api.char_p, ctypes.c_void_p, ctypes.c_void_p)
        function = self.function("vkEnumerateDeviceExtensionProperties", *arguments)
        return frozenset(x.name.decode() for x in api.enumerate_all(function, api.Extension, physical, None))


class Device:
    """Open device: one compute queue, its memory types, and frequently called functions.

    One thread at a time may use the queue and its pools: see `run_alone`.
    """

    def __init__(self, instance: Instance, info: DeviceInfo) -> None:
        if info.refusal():
            raise VulkanError(info.refusal())
        self.instance, self.info = instance, info
        self.lost = ""  # the reason, once the device is lost
        self._lock = threading.RLock()
        self.physical = instance.physical(info.index)
        self.family = self._queue_family()
        self.memory = instance.memory(self.physical)
        self.handle = self._create()
        self.lookup = instance.function("vkGetDeviceProcAddr", ctypes.c_void_p, api.char_p, result=ctypes.c_void_p)
        self.queue = ctypes.c_void_p()
        get_queue = self.function("vkGetDeviceQueue", ctypes.c_void_p, u32, u32, ctypes.c_void_p, result=None)
        get_queue(self.handle, self.family, 0, address(self.queue))
        _devices.add(self)

    def run_alone(self, work: Callable[[], T]) -> T:
        """Call `work` while other threads cannot use the device.

        This is not a generator-based context manager, because an exception in a signal handler could leave it suspended
        with the lock held. A lost device is refused before the lock is acquired, because a forked child may inherit a
        lock that is never released.

        Raises:
            DeviceLost: the device is lost.
            VulkanError: this thread is already inside such a call, for example because a signal handler or a finalizer
                makes another call in the middle of it.
        """
        self._check_lost()
        while self._lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition asks
            if self._is_running(sys._getframe().f_back):
                raise VulkanError(
                    f"{self.info.name} is in the middle of a call of this thread. "
                    "Make no Vulkan call in a signal handler or finalizer"
                )
            self._lock.release()  # an exception in a debugger or tracer ended a call just before its last step
        # Implemented in C: after an exception in a signal handler, the lock is free or this block was entered.
        with self._lock:
            self._check_lost()
            return work()

    def _is_running(self, frame: FrameType | None) -> bool:
        """Return whether `run_alone` of this device is among the callers."""
        while frame:
            if frame.f_code is Device.run_alone.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _check_lost(self) -> None:
        if self.lost:
            raise DeviceLost(self.lost, api.LOST)

    def function(self, name: str, *arguments: Any, result: Any = api.i32) -> Any:
        found = self.lookup(self.handle, name.encode())
        if not found:
            raise VulkanError(f"the Vulkan driver has no {name}")
        return ctypes.CFUNCTYPE(result, *arguments)(found)

    def create(self, name: str, info: Any) -> int:
        """Return the handle of a new object."""
        made = api.u64()
        call = self.function(name, *[ctypes.c_void_p] * 4)
        self.check(call(self.handle, address(info), None, address(made)), name)
        return int(made.value)

    def destroy(self, name: str, handle: int) -> None:
        self.function(name, ctypes.c_void_p, api.u64, ctypes.c_void_p, result=None)(self.handle, handle, None)

    def check(self, result: int, what: str) -> None:
        """Check a result like `api.check`, and mark the device as lost if it is."""
        try:
            check(result, f"{self.info.name}: {what}")
        except DeviceLost as error:
            self.lost = str(error)
            raise

    def _queue_family(self) -> int:
        function = self.instance.function(
            "vkGetPhysicalDeviceQueueFamilyProperties", *[ctypes.c_void_p] * 3, result=None
        )
        families = api.enumerate_all(function, api.QueueFamily, self.physical)
        able = [i for i, family in enumerate(families) if family.flags & COMPUTE_QUEUE]
        if not able:
            raise VulkanError(f"{self.info.name} has no compute queue")
        alone = [i for i in able if not families[i].flags & GRAPHICS_QUEUE]
        return (alone or able)[0]

    def _create(self) -> Any:
        priority = ctypes.c_float(1.0)
        queue = make(api.QueueCreateInfo, family=self.family, count=1, priorities=address(priority))
        wanted = [name.encode() for name in (PORTABILITY, *self._matrix_extensions()) if name in self.info.extensions]
        names = (ctypes.c_char_p * max(1, len(wanted)))(*wanted)
        info = make(
            api.DeviceCreateInfo,
            n_queues=1,
            queues=address(queue),
            n_extensions=len(wanted),
            extensions=ctypes.cast(names, ctypes.c_void_p),
        )
        if self.info.matrices.shapes:
            features = matrices.query_features(self.instance.function, self.physical, self.info.extensions)
            info.pNext = features.chain()
        handle = ctypes.c_void_p()
        create = self.instance.function("vkCreateDevice", *[ctypes.c_void_p] * 4)
        check(create(self.physical, address(info), None, address(handle)), f"{self.info.name}: vkCreateDevice")
        return handle

    def _matrix_extensions(self) -> tuple[str, ...]:
        return (matrices.MATRIX, matrices.BFLOAT16) if self.info.matrices.shapes else ()


_open: dict[str, Any] = {}  # "instance", "device", and the "settings" with which they were opened
_devices: WeakSet[Device] = WeakSet()  # all devices that this process has opened
_opening = threading.RLock()  # held while an instance or a device is opened
_loaded = False  # this process has loaded drivers, perhaps with settings that have changed since
_forked = False  # this process was forked from one with loaded drivers, whose threads do not exist here
FORKED = "this process was forked from one that used Vulkan, which no driver supports. Use spawn"


def _after_fork() -> None:
    """Mark all that the parent process opened as lost, so that plans and arrays on it are refused immediately."""
    global _forked, _opening
    _forked = _loaded
    _opening = threading.RLock()  # another thread of the parent process may have held the lock
    _open.clear()
    for opened in _devices:
        opened.lost = FORKED


def instance() -> Instance:
    """Return the instance, which is created at first use.

    Raises:
        VulkanError: there is no loader or no working driver, the drivers are known to crash a process that loads them,
            or this process was forked from one that had loaded them.
    """
    global _loaded
    if _forked:
        raise VulkanError(FORKED)
    with _opening:
        if "instance" not in _open:
            crash = "" if _loaded else first_contact.known_crash()
            if crash:
                raise VulkanError(crash)
            _loaded = True
            _open["settings"] = _settings()
            _open["instance"] = Instance()
        found: Instance = _open["instance"]
        return found


def has_loaded() -> bool:
    """Return whether this process, or the process that it was forked from, has loaded drivers."""
    return _loaded


def _settings() -> dict[str, Any]:
    """Return the settings that determine which device is opened, and how."""
    values = settings.current()._asdict()
    return {name: value for name, value in values.items() if name.startswith("vulkan") or name == "cache"}


def device() -> Device:
    """Return the device, opened at first use and again after a loss.

    Raises:
        VulkanError: no device can compute.
    """
    with _opening:
        found: Device | None = _open.get("device")
        if found is None or found.lost:
            _open["device"] = found = Device(instance(), instance().choose())
        return found


def forget() -> None:
    """Open a device again at the next use. Objects that hold the open device keep it."""
    _open.clear()


@settings.on_reload
def _follow_settings() -> None:
    """Keep the open device unless a Vulkan setting has changed, because each open device needs memory and threads."""
    if _open and _open["settings"] != _settings():
        forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
