"""Properties of GPUs that tuning needs. Triton's interpreter counts as a device."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...definition.passes import FORWARD, SECOND, Pass

INTERPRETER = "interpreter"
DEVICES = ("cuda", "xpu")  # torch's names; AMD's GPUs are "cuda" too
DISTRIBUTIONS = ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu", "triton-windows")
OLDEST_SM = 70
LARGEST_HEAD_DIM = 512
# ... with gradients on cards with little shared memory, which must hold tiles of four arrays
LARGEST_WITH_GRADIENTS = {
    ("sm_70", "float32"): 256, ("sm_75", "float32"): 128, ("sm_75", "float16"): 256, ("sm_75", "bfloat16"): 256,
}  # fmt: skip
# ... with second derivatives, which hold tiles of seven arrays
_SMALL, _LARGE = ("sm_70", "sm_75", "sm_86", "sm_89", "sm_120"), ("sm_80", "sm_90", "sm_100")
LARGEST_WITH_SECOND = {
    **{(arch, dtype): 256 for arch in _SMALL for dtype in ("float16", "bfloat16")},
    **{(arch, "float32"): 128 for arch in _SMALL},
    **{(arch, "float32"): 256 for arch in _LARGE},
}
NEWEST_FOR_GFX103 = (3, 6)


@dataclass(frozen=True, slots=True)
class Device:
    """Architecture (sm_90, gfx942, xpu, interpreter), multiprocessors, bytes of L2 cache."""

    arch: str
    processors: int
    l2_bytes: int


def installed() -> tuple[int, ...] | None:
    """Return Triton's version, for example (3, 9), from the metadata of its package; None if it is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return tuple(int(part) for part in re.findall(r"\d+", version(name))[:2])
        except PackageNotFoundError:
            continue
    return None


def refusal(arch: str) -> str | None:
    """Return why Triton is known not to compile for this architecture, or None."""
    if arch.startswith("sm_") and int(arch[3:]) < OLDEST_SM:
        return f"Triton compiles for sm_{OLDEST_SM} and later; this card is {arch}"
    if arch.startswith("gfx103") and (installed() or ()) > NEWEST_FOR_GFX103:
        return f"Triton after {'.'.join(map(str, NEWEST_FOR_GFX103))} does not compile for {arch}"
    return None


def largest_head_dim(arch: str, dtype: str, pass_: Pass) -> int:
    """Return the largest supported head_dim and head_dim_v."""
    if pass_ is FORWARD:
        return LARGEST_HEAD_DIM
    table = LARGEST_WITH_SECOND if pass_ is SECOND else LARGEST_WITH_GRADIENTS
    return table.get((arch, dtype), LARGEST_HEAD_DIM)


def cards() -> list[tuple[str, str, str]]:
    """Return (torch's name, product, architecture) of the GPUs that torch finds."""
    try:
        import torch
    except ImportError:
        return []
    found = []
    for kind in DEVICES:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            names = [f"{kind}:{index}" for index in range(module.device_count())]
            found += [(name, module.get_device_name(name), device(name).arch) for name in names]
    return found


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter.

    Triton reads TRITON_INTERPRET when the kernels are imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def device(name: str) -> Device:
    """Return the device of a torch name such as "cuda:0". An architecture's name gives a card that is not installed."""
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
