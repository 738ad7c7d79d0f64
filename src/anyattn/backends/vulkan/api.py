"""Vulkan's C API through ctypes, as far as the backend uses it: structures, functions, and results as exceptions."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from ...definition.errors import DeviceError

u32, u64, i32, size_t, pointer, char_p = (
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_int32,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_char_p,
)
COMPUTE_STAGE = 0x20
SHUFFLE = 1 << 4  # VK_SUBGROUP_FEATURE_SHUFFLE_BIT
TIMEOUT, LOST, OUT_OF_HOST_MEMORY, OUT_OF_DEVICE_MEMORY = 2, -4, -1, -2
RESULTS = {
    0: "success",
    TIMEOUT: "timeout",
    OUT_OF_HOST_MEMORY: "out of host memory",
    OUT_OF_DEVICE_MEMORY: "out of device memory",
    -3: "initialization failed",
    LOST: "device lost",
    -5: "memory map failed",
    -6: "layer not present",
    -7: "extension not present",
    -8: "feature not present",
    -9: "incompatible driver (no working Vulkan driver was found)",
    -10: "too many objects",
    -12: "fragmented pool",
}


class VulkanError(DeviceError):
    """Failure of a Vulkan call, or no Vulkan on this machine."""

    def __init__(self, text: str, result: int = 0) -> None:
        super().__init__(text)
        self.result = result


class DeviceLost(VulkanError):
    """Loss of the device, which failed or did not answer in time. The next call opens the device again."""


def struct(name: str, *fields: tuple[str, Any]) -> Any:
    """Return a C structure type."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def chained(name: str, structure_type: int, *fields: tuple[str, Any]) -> Any:
    """Return a structure type that starts with sType and pNext. `make` fills in sType."""
    made = struct(name, ("sType", u32), ("pNext", pointer), *fields)
    made.TYPE = structure_type
    return made


def make(kind: Any, **values: Any) -> Any:
    made = kind(**values)
    made.sType = kind.TYPE
    return made


def address(thing: Any) -> int:
    return ctypes.addressof(thing)


def _u32s(names: str) -> list[tuple[str, Any]]:
    return [(name, u32) for name in names.split()]


ApplicationInfo = chained(
    "ApplicationInfo",
    0,
    *(("name", char_p), ("version", u32), ("engine", char_p), ("engine_version", u32), ("api", u32)),
)
_LISTS = (("n_layers", u32), ("layers", pointer), ("n_extensions", u32), ("extensions", pointer))
InstanceCreateInfo = chained("InstanceCreateInfo", 1, ("flags", u32), ("application", pointer), *_LISTS)
QueueCreateInfo = chained(
    "QueueCreateInfo", 2, ("flags", u32), ("family", u32), ("count", u32), ("priorities", pointer)
)
DeviceCreateInfo = chained(
    "DeviceCreateInfo", 3, ("flags", u32), ("n_queues", u32), ("queues", pointer), *_LISTS, ("features", pointer)
)
SubmitInfo = chained(
    "SubmitInfo",
    4,
    *(("n_wait", u32), ("wait", pointer), ("stages", pointer), ("n_commands", u32), ("commands", pointer)),
    *(("n_signal", u32), ("signal", pointer)),
)
MemoryAllocateInfo = chained("MemoryAllocateInfo", 5, ("size", u64), ("type", u32))
FenceCreateInfo = chained("FenceCreateInfo", 8, ("flags", u32))
BufferCreateInfo = chained(
    "BufferCreateInfo",
    12,
    *(("flags", u32), ("size", u64), ("usage", u32), ("sharing", u32), ("n_families", u32), ("families", pointer)),
)
ShaderModuleCreateInfo = chained("ShaderModuleCreateInfo", 16, ("flags", u32), ("size", size_t), ("code", pointer))
PipelineCacheCreateInfo = chained("PipelineCacheCreateInfo", 17, ("flags", u32), ("size", size_t), ("data", pointer))
StageCreateInfo = chained(
    "StageCreateInfo", 18, ("flags", u32), ("stage", u32), ("module", u64), ("name", char_p), ("constants", pointer)
)
ComputePipelineCreateInfo = chained(
    "ComputePipelineCreateInfo",
    29,
    *(("flags", u32), ("stage", StageCreateInfo), ("layout", u64), ("base", u64), ("base_index", i32)),
)
PipelineLayoutCreateInfo = chained(
    "PipelineLayoutCreateInfo",
    30,
    *(("flags", u32), ("n_sets", u32), ("sets", pointer), ("n_ranges", u32), ("ranges", pointer)),
)
SetLayoutCreateInfo = chained("SetLayoutCreateInfo", 32, ("flags", u32), ("count", u32), ("bindings", pointer))
DescriptorPoolCreateInfo = chained(
    "DescriptorPoolCreateInfo", 33, ("flags", u32), ("max_sets", u32), ("n_sizes", u32), ("sizes", pointer)
)
SetAllocateInfo = chained("SetAllocateInfo", 34, ("pool", u64), ("count", u32), ("layouts", pointer))
WriteSet = chained(
    "WriteSet",
    35,
    *(("set", u64), ("binding", u32), ("element", u32), ("count", u32), ("type", u32), ("images", pointer)),
    *(("buffers", pointer), ("texels", pointer)),
)
CommandPoolCreateInfo = chained("CommandPoolCreateInfo", 39, ("flags", u32), ("family", u32))
CommandBufferAllocateInfo = chained("CommandBufferAllocateInfo", 40, ("pool", u64), ("level", u32), ("count", u32))
BeginInfo = chained("BeginInfo", 42, ("flags", u32), ("inheritance", pointer))
MemoryBarrier = chained("MemoryBarrier", 46, ("source", u32), ("target", u32))
Binding = struct("Binding", *_u32s("binding type count stages"), ("samplers", pointer))
PushRange = struct("PushRange", *_u32s("stages offset size"))
PoolSize = struct("PoolSize", *_u32s("type count"))
BufferInfo = struct("BufferInfo", ("buffer", u64), ("offset", u64), ("range", u64))
BufferCopy = struct("BufferCopy", ("source", u64), ("target", u64), ("size", u64))
MemoryRequirements = struct("MemoryRequirements", ("size", u64), ("alignment", u64), ("types", u32))
MemoryType = struct("MemoryType", *_u32s("flags heap"))
MemoryHeap = struct("MemoryHeap", ("size", u64), ("flags", u32))
MemoryProperties = struct(
    "MemoryProperties", ("n_types", u32), ("types", MemoryType * 32), ("n_heaps", u32), ("heaps", MemoryHeap * 16)
)
QueueFamily = struct("QueueFamily", *_u32s("flags count timestamp_bits width height depth"))
Extension = struct("Extension", ("name", ctypes.c_char * 256), ("version", u32))
Layer = struct("Layer", ("name", ctypes.c_char * 256), *_u32s("spec version"), ("text", ctypes.c_char * 256))

Limits = struct(
    "Limits",
    *_u32s("image_1d image_2d image_3d image_cube image_layers texels maxUniformBufferRange maxStorageBufferRange"),
    *_u32s("maxPushConstantsSize maxMemoryAllocationCount samplers"),
    *(("granularity", u64), ("sparse", u64)),
    *_u32s("maxBoundDescriptorSets stage_samplers stage_uniforms maxPerStageDescriptorStorageBuffers"),
    ("stages_and_sets", u32 * 34),
    *_u32s("maxComputeSharedMemorySize groups_x groups_y groups_z maxComputeWorkGroupInvocations"),
    *(("group_size", u32 * 3), ("drawing", u32 * 13), ("minMemoryMapAlignment", size_t)),
    *(("texel_alignment", u64), ("uniform_alignment", u64), ("minStorageBufferOffsetAlignment", u64)),
    *(
        ("framebuffer", u32 * 21),
        ("timestamps", u32),
        ("timestampPeriod", ctypes.c_float),
        ("rest", u32 * 13),
        ("copies", u64 * 3),
    ),
)
Properties = struct(
    "Properties",
    *_u32s("api driver vendor device type"),
    *(("name", ctypes.c_char * 256), ("cache_uuid", ctypes.c_uint8 * 16), ("limits", Limits), ("sparse", u32 * 5)),
)
DEBUG_CALLBACK = ctypes.CFUNCTYPE(u32, u32, u32, pointer, pointer)
DebugMessage = chained("DebugMessage", 1000128003, ("flags", u32), ("id_name", char_p), ("id", i32), ("text", char_p))
DebugMessengerCreateInfo = chained(
    "DebugMessengerCreateInfo",
    1000128004,
    *_u32s("flags severities kinds"),
    *(("callback", DEBUG_CALLBACK), ("user", pointer)),
)
Properties2 = chained("Properties2", 1000059001, ("properties", Properties))
SubgroupProperties = chained("SubgroupProperties", 1000094000, *_u32s("size stages operations quad"))
Maintenance3Properties = chained("Maintenance3Properties", 1000168000, ("descriptors", u32), ("allocation", u64))
DriverProperties = chained(
    "DriverProperties",
    1000196000,
    *(("id", u32), ("name", ctypes.c_char * 256), ("info", ctypes.c_char * 256), ("conformance", ctypes.c_uint8 * 4)),
)

# Features and properties that cooperative matrices need, and the subgroup size of a pipeline that uses them.
Features2 = chained("Features2", 1000059000, ("features", u32 * 55))
CooperativeMatrixFeatures = chained("CooperativeMatrixFeatures", 1000506000, *_u32s("matrix robust"))
CooperativeMatrixProperties = chained(
    "CooperativeMatrixProperties", 1000506001, *_u32s("m n k a b c result saturating scope")
)
MemoryModelFeatures = chained("MemoryModelFeatures", 1000211000, *_u32s("model device chains"))
Float16Features = chained("Float16Features", 1000082000, *_u32s("float16 int8"))
Bfloat16Features = chained("Bfloat16Features", 1000141000, *_u32s("type dot matrix"))
SubgroupSizeFeatures = chained("SubgroupSizeFeatures", 1000225002, *_u32s("control full"))
SubgroupSizeProperties = chained("SubgroupSizeProperties", 1000225000, *_u32s("least most subgroups stages"))
RequiredSubgroupSize = chained("RequiredSubgroupSize", 1000225001, ("size", u32))


MACOS_LOADERS = ("libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib")
HOMEBREW = ("/opt/homebrew/lib", "/usr/local/lib")  # for Apple silicon and Intel; macOS does not search the first
LOADERS = {
    "linux": ("libvulkan.so.1", "libvulkan.so"),
    "win32": ("vulkan-1.dll",),
    "darwin": (*MACOS_LOADERS, *(f"{folder}/{name}" for folder in HOMEBREW for name in MACOS_LOADERS)),
}


@cache
def library() -> Any:
    """Return the Vulkan loader. No driver is loaded yet.

    Raises:
        VulkanError: no loader is installed.
    """
    errors = []
    for name in LOADERS.get(sys.platform, LOADERS["linux"]):
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
    raise VulkanError(f"no Vulkan loader is installed ({'; '.join(errors)})")


def global_function(name: str, *arguments: Any) -> Any:
    return instance_function(None, name, *arguments)


def instance_function(instance: Any, name: str, *arguments: Any, result: Any = i32) -> Any:
    """Return a function of the instance (None: of the loader); raise VulkanError if it is missing."""
    lookup = library().vkGetInstanceProcAddr
    lookup.restype, lookup.argtypes = pointer, [pointer, char_p]
    found = lookup(instance, name.encode())
    if not found:
        raise VulkanError(f"the Vulkan driver has no {name}")
    return ctypes.CFUNCTYPE(result, *arguments)(found)


def check(result: int, what: str) -> None:
    """Raise if a call failed."""
    if result >= 0 and result != TIMEOUT:
        return
    text = f"{what}: {RESULTS.get(result, 'error')} ({result})"
    raise (DeviceLost if result in (TIMEOUT, LOST) else VulkanError)(text, result)


def enumerate_all(function: Any, kind: Any, *arguments: Any) -> Any:
    """Return all items, by Vulkan's two calls: the first gives their number, the second the items."""
    count = u32()
    check(function(*arguments, address(count), None) or 0, "an enumeration")
    found = (kind * max(1, count.value))(*[make(kind) for _ in range(count.value if hasattr(kind, "TYPE") else 0)])
    check(function(*arguments, address(count), address(found)) or 0, "an enumeration")
    return found[: count.value]
