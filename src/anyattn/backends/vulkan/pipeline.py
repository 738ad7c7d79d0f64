"""Compute pipelines: a committed SPIR-V module, frozen with constants, that the driver compiles once."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from . import api
from .api import address, make, u64
from .device import COMPUTE_STAGE, STORAGE_BUFFERS, Device
from .spirv import freeze

STORAGE_BUFFER = 7
PUSH_BYTES = 32
FULL_SUBGROUPS = 2
BINARIES = Path(__file__).parent / "binaries"


class Layout:
    """What every shader of ours is given: storage buffers 0 to 11 and the push constants of shaders/include."""

    def __init__(self, device: Device) -> None:
        bindings = (api.Binding * STORAGE_BUFFERS)(
            *[api.Binding(i, STORAGE_BUFFER, 1, COMPUTE_STAGE, None) for i in range(STORAGE_BUFFERS)]
        )
        info = make(api.SetLayoutCreateInfo, count=STORAGE_BUFFERS, bindings=address(bindings))
        self.set_layout = device.create("vkCreateDescriptorSetLayout", info)
        sets, push = u64(self.set_layout), api.PushRange(COMPUTE_STAGE, 0, PUSH_BYTES)
        whole = make(api.PipelineLayoutCreateInfo, n_sets=1, sets=address(sets), n_ranges=1, ranges=address(push))
        self.handle = device.create("vkCreatePipelineLayout", whole)


class Pipelines:
    """The pipelines of a device by name and constants; each is made at first use."""

    def __init__(self, device: Device, layout: Layout) -> None:
        self.device, self.layout = device, layout
        self._cache = device.create("vkCreatePipelineCache", make(api.PipelineCacheCreateInfo))
        self._made: dict[tuple[str, tuple[tuple[int, int], ...], bool], int] = {}

    def get(self, name: str, constants: Mapping[int, int], *, unroll: bool, subgroup: int = 0) -> int:
        """The handle of the pipeline of binaries/<name>.spv with these specialization constants.

        `subgroup`: the size of its subgroups, where they must all be full and of one size.
        """
        key = (name, tuple(sorted(constants.items())), unroll)
        if key not in self._made:
            self._made[key] = self._create(freeze(binary(name), constants, unroll=unroll), subgroup)
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
            result = create(device.handle, self._cache, 1, address(whole), None, address(made))
            device.check(result, "vkCreateComputePipelines")
        finally:
            device.destroy("vkDestroyShaderModule", shader)
        return int(made.value)


@cache
def binary(name: str) -> bytes:
    """A committed SPIR-V module."""
    return (BINARIES / f"{name}.spv").read_bytes()
