"""Which GPU a tensor lies on, as far as tuning needs to know. The interpreter counts as a device of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class Device:
    """Architecture (sm_90, gfx942, xpu, interpreter), multiprocessors, bytes of L2 cache."""

    arch: str
    processors: int
    l2_bytes: int


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which reads TRITON_INTERPRET itself when they are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def device(name: str) -> Device:
    """The device of that torch name, "cuda:0"; an architecture's name stands for a card that is not here."""
    kind, _, number = name.partition(":")
    if kind.startswith(("sm_", "gfx")):
        return Device(kind, 128, 2**25)
    if interpreted():
        return Device(INTERPRETER, 16, 2**20)
    import torch

    index = int(number or 0)
    properties: Any
    if kind == "xpu":
        properties = torch.xpu.get_device_properties(index)
        return Device("xpu", int(properties.max_compute_units), 2**24)
    properties = torch.cuda.get_device_properties(index)
    capability = f"sm_{properties.major}{properties.minor}"
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else capability
    return Device(arch, int(properties.multi_processor_count), int(properties.L2_cache_size))
