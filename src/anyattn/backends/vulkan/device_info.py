"""Description of a Vulkan device: its limits, its compute paths, and its rank among other devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .matrices import Matrices

KINDS = {0: "other", 1: "integrated", 2: "discrete", 3: "virtual", 4: "software"}
ORDER = ("discrete", "integrated", "virtual", "other", "software")
SCALAR, SHUFFLES, MATRICES = "scalar", "subgroup shuffles", "cooperative matrices"
TRANSLATION_LAYERS = ("dozen",)  # drivers that reach a GPU through another API, next to the GPU's own driver

# Minimum that the shaders need.
STORAGE_BUFFERS = 12  # maximum that one shader binds
SHARED_MEMORY = 4096  # bytes: sums of 128 invocations with 8 scores each
INVOCATIONS = 128  # minimum of every Vulkan device


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Properties of a device, as its driver reports them."""

    index: int
    name: str
    kind: str
    api: tuple[int, int, int]
    driver: str
    subgroup: int
    shuffle: bool  # subgroup shuffles in compute shaders
    storage_range: int  # bytes that one binding may cover
    allocation: int  # bytes of one allocation
    alignment: int  # alignment of a binding's offset
    shared_memory: int
    invocations: int  # in one workgroup
    groups: tuple[int, int, int]  # workgroups of one dispatch
    cache_key: str  # changes with the driver
    extensions: frozenset[str]
    matrices: Matrices
    storage_buffers: int = STORAGE_BUFFERS  # per shader
    memory: int = 0  # bytes of the device's own memory

    @property
    def software(self) -> bool:
        return self.kind == "software"

    @property
    def translated(self) -> bool:
        """Return whether the driver translates Vulkan to another API of the same GPU."""
        return self.driver.lower().startswith(TRANSLATION_LAYERS)

    def refusal(self) -> str:
        """Return why this device cannot compute; "" if it can."""
        if self.api < (1, 1, 0):
            return f"{self.name} supports Vulkan {'.'.join(map(str, self.api))}, but 1.1 is needed"
        limits = (
            ("storage buffers for one shader", self.storage_buffers, STORAGE_BUFFERS),
            ("bytes of shared memory", self.shared_memory, SHARED_MEMORY),
            ("invocations of one workgroup", self.invocations, INVOCATIONS),
        )
        few = [f"{had} {what} ({needed} are needed)" for what, had, needed in limits if had < needed]
        return f"{self.name} has only {', '.join(few)}" if few else ""

    def rank(self) -> tuple[bool, bool, bool, int, int, int]:
        """Return the sort key of devices, best first.

        Order: devices that can compute, GPUs, the GPU's own driver, the kind of device, the most memory.
        """
        kind = ORDER.index(self.kind)
        return bool(self.refusal()), self.software, self.translated, kind, -self.memory, -self.allocation

    def paths(self) -> dict[str, str]:
        """Return the compute paths, slowest first -> why this device cannot use the path; "" if it can."""
        return {
            SCALAR: self.refusal(),
            SHUFFLES: "" if self.shuffle else "the driver has none in compute shaders",
            MATRICES: self.matrices.off,
        }

    def without(self, path: str) -> DeviceInfo:
        """Return the device without a path that computes wrongly."""
        if path == MATRICES:
            return replace(self, matrices=Matrices(off="failed its test"))
        return replace(self, shuffle=False)

    def describe(self) -> dict[str, Any]:
        """Return the description for `anyattn info`, JSON-ready."""
        paths = self.paths()
        version = ".".join(map(str, self.api))
        return {
            "index": self.index,
            "name": self.name,
            "kind": self.kind,
            "driver": f"{self.driver}, Vulkan {version}, subgroups of {self.subgroup}",
            "memory": f"{self.memory} bytes, bindings of {self.storage_range}, allocations of {self.allocation}",
            "paths": ", ".join(name for name, reason in paths.items() if not reason),
            "off": "; ".join(f"{name}: {reason}" for name, reason in paths.items() if reason),
        }
