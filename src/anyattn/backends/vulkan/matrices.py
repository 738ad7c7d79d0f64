"""Cooperative matrices: the shapes in which a device can multiply tiles of 16-bit numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import api
from .api import COMPUTE_STAGE, SHUFFLE, address, make

MATRIX, BFLOAT16 = "VK_KHR_cooperative_matrix", "VK_KHR_shader_bfloat16"
API_VERSION = (1, 3, 0)
SUBGROUP_SCOPE = 3
TYPES = {0: "float16", 1: "float32", 1000141000: "bfloat16"}
SIZES = (8, 16, 32)  # rows of staged tiles are whole 16-byte vectors, and steps of 32 keys are whole tiles
MOST_SHARED = 16  # the fastest shape on most hardware

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """Product of (m, k) and (k, n) numbers of `dtype`, summed in float32."""

    m: int
    n: int
    k: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Matrices:
    """Supported shapes of a device. off: why there are none."""

    shapes: tuple[Shape, ...] = ()
    off: str = ""

    def best(self, dtype: str) -> Shape | None:
        """Return the supported shape that is nearest to the common one."""
        found = [x for x in self.shapes if x.dtype == dtype]
        return min(found, key=lambda x: sum(abs(size - MOST_SHARED) for size in (x.m, x.n, x.k)), default=None)


class Features:
    """Features that matrices need, as structures to query and to enable them."""

    def __init__(self, extensions: frozenset[str]) -> None:
        self.matrix = make(api.CooperativeMatrixFeatures)
        self.model = make(api.MemoryModelFeatures)
        self.halves = make(api.Float16Features)
        self.subgroups = make(api.SubgroupSizeFeatures)
        self.bfloat = make(api.Bfloat16Features)
        self._all = [self.matrix, self.model, self.halves, self.subgroups]
        if BFLOAT16 in extensions:
            self._all.append(self.bfloat)

    def chain(self) -> int:
        """Return the address of the first structure; each points to the next."""
        for one, following in zip(self._all, self._all[1:], strict=False):
            one.pNext = address(following)
        return address(self._all[0])

    def missing(self) -> str:
        needed = {
            "cooperativeMatrix": self.matrix.matrix,
            "vulkanMemoryModel": self.model.model,
            "subgroupSizeControl": self.subgroups.control,
            "computeFullSubgroups": self.subgroups.full,
        }
        return ", ".join(name for name, offered in needed.items() if not offered)

    def of(self, dtype: str) -> bool:
        """Return whether shaders may multiply matrices of this type."""
        return bool(self.halves.float16) if dtype == "float16" else bool(self.bfloat.type and self.bfloat.matrix)

    def only_needed(self) -> Features:
        """Return the features to enable: none that costs a driver checks."""
        self.matrix.robust = self.model.device = self.model.chains = self.halves.int8 = 0
        return self


def query_features(function: Function, physical: Any, extensions: frozenset[str]) -> Features:
    """Return the features of a physical device. function: looks up a function of the instance."""
    features = Features(extensions)
    both = make(api.Features2, pNext=features.chain())
    function("vkGetPhysicalDeviceFeatures2", ctypes.c_void_p, ctypes.c_void_p, result=None)(physical, address(both))
    return features.only_needed()


def query(function: Function, physical: Any, version: tuple[int, int, int], extensions: frozenset[str]) -> Matrices:
    """Return the matrices of a physical device."""
    if MATRIX not in extensions:
        return Matrices(off=f"the driver has no {MATRIX}")
    if version < API_VERSION:
        return Matrices(off="Vulkan 1.3 is needed")
    features = query_features(function, physical, extensions)
    missing = features.missing() or _missing_subgroups(function, physical)
    if missing:
        return Matrices(off=f"the driver has no {missing}")
    enumerate_shapes = function("vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR", *[ctypes.c_void_p] * 3)
    found = (_shape(x) for x in api.enumerate_all(enumerate_shapes, api.CooperativeMatrixProperties, physical))
    shapes = tuple(dict.fromkeys(x for x in found if x and features.of(x.dtype)))
    if not shapes:
        return Matrices(off="the driver supports no 16-bit matrices of 8, 16 or 32 with float32 sums")
    return Matrices(shapes)


def _missing_subgroups(function: Function, physical: Any) -> str:
    """Return the subgroup feature that the shaders also need and the device lacks, or ""."""
    sizes, subgroups = make(api.SubgroupSizeProperties), make(api.SubgroupProperties)
    both = make(api.Properties2, pNext=address(sizes))
    sizes.pNext = address(subgroups)
    function("vkGetPhysicalDeviceProperties2", ctypes.c_void_p, ctypes.c_void_p, result=None)(physical, address(both))
    if not sizes.stages & COMPUTE_STAGE:
        return "subgroups of a required size in compute shaders"
    shuffles = subgroups.operations & SHUFFLE and subgroups.stages & COMPUTE_STAGE
    return "" if shuffles else "subgroup shuffles in compute shaders"


def _shape(one: Any) -> Shape | None:
    """Return the shape, or None if the shaders cannot use it."""
    dtype = TYPES.get(one.a, "")
    of_sum = [TYPES.get(x) for x in (one.c, one.result)]
    usable = dtype in ("float16", "bfloat16") and one.b == one.a and of_sum == ["float32", "float32"]
    if not usable or one.scope != SUBGROUP_SCOPE or any(size not in SIZES for size in (one.m, one.n, one.k)):
        return None
    return Shape(one.m, one.n, one.k, dtype)
