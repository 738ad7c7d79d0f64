"""Compute pipelines: committed SPIR-V modules, frozen with constants, which the driver compiles once."""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ...config import package, private_files, settings
from . import api
from .api import COMPUTE_STAGE, address, make, u64
from .device import Device
from .device_info import STORAGE_BUFFERS
from .linking import BINDINGS, link
from .score_code import Body, generate
from .spirv import freeze

STORAGE_BUFFER = 7
PUSH_BYTES = 32
FULL_SUBGROUPS = 2
DIGEST_BYTES = 32
LIBRARY = "function"  # module of functions that other modules are linked with

logger = logging.getLogger("anyattn")


class Layout:
    """Layout of every shader: storage buffers 0 to 11 and the push constants of shaders/include."""

    def __init__(self, device: Device) -> None:
        bindings = (api.Binding * STORAGE_BUFFERS)(
            *[api.Binding(i, STORAGE_BUFFER, 1, COMPUTE_STAGE, None) for i in range(STORAGE_BUFFERS)]
        )
        info = make(api.SetLayoutCreateInfo, count=STORAGE_BUFFERS, bindings=address(bindings))
        self.set_layout = device.create("vkCreateDescriptorSetLayout", info)
        sets, push = u64(self.set_layout), api.PushRange(COMPUTE_STAGE, 0, PUSH_BYTES)
        whole = make(api.PipelineLayoutCreateInfo, n_sets=1, sets=address(sets), n_ranges=1, ranges=address(push))
        self.handle = device.create("vkCreatePipelineLayout", whole)


class Kept:
    """Cache of the driver's compiled shaders, stored in a file for the next process if there is a folder for it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._path = ""
        if settings.current().cache:
            self._path = str(Path(settings.current().cache) / f"vulkan-{device.info.cache_key}.bin")
        data = self._read()
        blob = ctypes.create_string_buffer(data, len(data) or 1)
        self.handle = device.create(
            "vkCreatePipelineCache", make(api.PipelineCacheCreateInfo, size=len(data), data=address(blob))
        )
        self._get = device.function("vkGetPipelineCacheData", ctypes.c_void_p, u64, ctypes.c_void_p, ctypes.c_void_p)
        self._size = len(data)

    def _read(self) -> bytes:
        """Return the stored cache, verified by a digest, because some drivers trust their input."""
        try:
            whole = private_files.read(self._path) if self._path else b""
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            warnings.warn(f"ignoring stored compiled shaders: {error}", RuntimeWarning, stacklevel=2)
            self._path = ""
            return b""
        digest, data = whole[:DIGEST_BYTES], whole[DIGEST_BYTES:]
        return data if hashlib.sha256(data).digest() == digest else b""

    def save(self) -> None:
        """Write the file if the cache has grown. A folder that cannot be written is not an error."""
        if not self._path:
            return
        device, size = self.device, ctypes.c_size_t()
        device.check(self._get(device.handle, self.handle, address(size), None), "vkGetPipelineCacheData")
        if size.value == self._size:
            return
        data = ctypes.create_string_buffer(size.value)
        device.check(self._get(device.handle, self.handle, address(size), address(data)), "vkGetPipelineCacheData")
        self._size, raw = size.value, data.raw[: size.value]
        try:
            private_files.write(self._path, hashlib.sha256(raw).digest() + raw)
        except OSError as error:
            logger.debug("compiled shaders are not stored: %s", error)
            self._path = ""


class Linked(NamedTuple):
    """Bodies of functions, and the binding of the numbers that they read."""

    bodies: tuple[tuple[str, Body], ...]
    binding: int

    def link(self, module: bytes) -> bytes:
        return link(module, binary(LIBRARY), dict(self.bodies), self.binding)


def linked(shader: str, score: str) -> Linked | None:
    """Return what is linked into a shader for the text of functions, or None."""
    return Linked(generate(score).bodies, BINDINGS[shader]) if score and shader in BINDINGS else None


class Pipelines:
    """Pipelines of a device by name and constants, each created at first use."""

    def __init__(self, device: Device, layout: Layout) -> None:
        self.device, self.layout = device, layout
        self._kept = Kept(device)
        self._made: dict[tuple[Any, ...], int] = {}

    def get(
        self,
        name: str,
        constants: Mapping[int, int],
        *,
        unroll: bool,
        subgroup: int = 0,
        functions: Linked | None = None,
    ) -> int:
        """Return the handle of the pipeline of a shader with these specialization constants.

        subgroup: the required size of its subgroups, which must all be full; 0: any.
        functions: those that are linked into the shader.
        """
        key = (name, tuple(sorted(constants.items())), unroll, functions)
        if key not in self._made:
            module = binary(name) if functions is None else functions.link(binary(name))
            self._made[key] = self._create(freeze(module, constants, unroll=unroll), subgroup)
            self._kept.save()
        return self._made[key]

    def _create(self, module: bytes, subgroup: int) -> int:
        device = self.device
        code = ctypes.create_string_buffer(module, len(module))
        info = make(api.ShaderModuleCreateInfo, size=len(module), code=address(code))
        shader = device.create("vkCreateShaderModule", info)
        stage = make(api.StageCreateInfo, stage=COMPUTE_STAGE, module=shader, name=b"main")
        size = make(api.RequiredSubgroupSize, size=subgroup)
        if subgroup:
            stage.flags, stage.pNext = FULL_SUBGROUPS, address(size)
        whole = make(api.ComputePipelineCreateInfo, stage=stage, layout=self.layout.handle, base_index=-1)
        made = u64()
        raw = ctypes.c_void_p
        create = device.function("vkCreateComputePipelines", raw, u64, api.u32, raw, raw, raw)
        try:
            result = create(device.handle, self._kept.handle, 1, address(whole), None, address(made))
            device.check(result, "vkCreateComputePipelines")
        finally:
            device.destroy("vkDestroyShaderModule", shader)
        return int(made.value)


def binary(name: str) -> bytes:
    """Return a committed SPIR-V module."""
    return binaries()[name]


@cache
def binaries() -> dict[str, bytes]:
    """Return the committed SPIR-V modules by name. They are one archive, because they have much in common."""
    import tarfile

    content = io.BytesIO(package.read("backends", "vulkan", "shaders.tar.xz"))
    with tarfile.open(fileobj=content) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        return {name.removesuffix(".spv"): file.read() for name, file in files.items() if file}
