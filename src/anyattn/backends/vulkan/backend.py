"""Vulkan backend: host arrays in, host arrays out, computed on a GPU.

Automatic choice considers it for every problem, so modules that open a device are imported only when one is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...config import settings
from ...definition.errors import DeviceError
from ...definition.passes import APPEND, BACKWARD, FORWARD
from ...definition.problem import Problem
from ...definition.score.derivative import differentiate
from ..base import Plan, without_cache_gradients, without_starts
from ..host_append import HostAppendPlan
from . import offload

if TYPE_CHECKING:
    from .device_info import DeviceInfo

DTYPES = ("float32", "float16", "bfloat16")
# Optional arrays that the kernels read.
EXTRAS = (
    *("bias", "mask", "alibi_slopes", "sink", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
    *("leftpad_k", "offset", "block_table", "cache_batch_idx", "rng_state", "captured", "captured_indices"),
)
MAX_HEAD_DIM = 256
EVIDENCE = {
    "tested": ("Mesa's software driver with and without cooperative matrices", "SwiftShader"),
    "expected": ("GPUs with a Vulkan 1.1 driver",),
}


class VulkanBackend:
    """Backend of Vulkan compute shaders."""

    name = "vulkan"
    passes = frozenset((FORWARD, BACKWARD, APPEND))
    score_functions = frozenset((FORWARD, BACKWARD))
    extras = frozenset(EXTRAS)
    may_fail = True

    def available(self, *, named: bool = False) -> str | None:
        """Return None or why it is not available.

        Unless the caller named it, a child process tries the drivers first.
        """
        from . import device as devices
        from .api import VulkanError

        try:
            import lzma  # noqa: F401
        except ImportError:
            return "needs Python's module lzma, which unpacks the shaders. Use a Python that was built with liblzma"
        if not named:
            against = _tried()[1]
            if against:
                return against
        try:
            info = devices.instance().choose()
        except VulkanError as error:
            return str(error)
        return (_software(info) if not named else "") or info.refusal() or None

    def supports(self, problem: Problem) -> list[str]:
        reasons = _misplaced(problem.device)
        if problem.pass_ is APPEND:
            return reasons
        if problem.device.startswith("vulkan") and problem.pass_ is BACKWARD:
            reasons.append("has no backward on device arrays")
        reasons += without_starts(problem)
        if problem.result_dtype != problem.dtype:
            reasons.append(f"has no results in {problem.result_dtype} (partial) for {problem.dtype}")
        if problem.dtype not in DTYPES:
            reasons.append(f"supports {', '.join(DTYPES)}, got q of {problem.dtype}")
        for name in ("head_dim", "head_dim_v"):
            size = getattr(problem, name)
            if size > MAX_HEAD_DIM:
                reasons.append(f"{name} {size} > {MAX_HEAD_DIM}")
        if problem.pass_ is BACKWARD:
            reasons += _backward_reasons(problem)
        return reasons or self._limits(problem)

    def _limits(self, problem: Problem) -> list[str]:
        """Return what the current device cannot store or computes wrongly."""
        from .backward import backward_regions
        from .forward import Setup, problem_launches
        from .tuning import backward_configs

        try:
            info = _info(problem)
        except DeviceError as error:
            return [str(error)]
        if problem.pass_ is FORWARD:
            setup = Setup.of(info, problem)
            regions, launches = setup.regions, setup.launches
        else:
            regions = backward_regions(problem, backward_configs(info, problem))
            launches = problem_launches(problem, regions, info.storage_range)
        if not launches:
            return [f"one head of one array is larger than a binding of {info.name}: {info.storage_range} bytes"]
        name, region = max(regions.items(), key=lambda item: item[1].nbytes)
        if region.nbytes > info.allocation:
            return [f"{name} has {region.nbytes} bytes; {info.name} allocates {info.allocation} at most"]
        return []

    def avoids(self, problem: Problem) -> list[str]:
        """Avoid small problems, because transfers cost more than a GPU gains. No driver is loaded for them.

        A device that does not work is no reason here, because `available` reports it.
        """
        if problem.device != "cpu":
            return []
        if problem.pass_ is APPEND:
            return ["a cache in host memory is appended to on the host"]
        too_small = offload.reasons_to_stay(problem)
        if too_small:
            return too_small
        device, against = _tried()
        return [] if against or device is None else offload.reasons_to_stay(problem, device)

    def plan(self, problem: Problem) -> Plan:
        if problem.pass_ is APPEND and problem.device == "cpu":
            return HostAppendPlan(problem)  # a host cache is not transferred for a few rows
        from .append import AppendPlan
        from .backward import BackwardPlan
        from .engine import current_engine
        from .forward import ForwardPlan

        if problem.pass_ is APPEND:
            return AppendPlan(problem)
        kind = ForwardPlan if problem.pass_ is FORWARD else BackwardPlan
        return kind(current_engine(), _info(problem), problem)


def _tried() -> tuple[offload.Described | None, str]:
    """Return the device that automatic choice would use, and why it does not. No driver is loaded for this."""
    from . import device as devices
    from . import first_contact
    from .api import VulkanError

    if devices.has_loaded():
        try:
            info = devices.instance().choose()
        except VulkanError as error:
            return None, str(error)
        return info, _software(info) or info.refusal()
    found = first_contact.report()
    return found, first_contact.reason(found) or _software(found)


def _software(device: offload.Described) -> str:
    if device.kind != "software" or settings.current().vulkan_software:
        return ""
    return f"{device.name} is a software driver, and the cpu backend is faster: name the backend to use it"


def _misplaced(device: str) -> list[str]:
    """Return why arrays on this device are not supported, or []."""
    if device == "cpu" or device.startswith("vulkan"):
        return []
    return [f"supports arrays in host memory or on a Vulkan device, got q on {device}"]


def _info(problem: Problem) -> DeviceInfo:
    """Return the device, without the paths that it must not use for the problem."""
    from .engine import current_engine
    from .selftest import usable

    return usable(current_engine(), problem.pass_, problem.dtype, functions=bool(problem.score))


def _backward_reasons(problem: Problem) -> list[str]:
    reasons = without_cache_gradients(problem)
    for name in ("out", "dout"):
        dtype = getattr(problem, name).dtype
        if dtype != problem.dtype:
            reasons.append(f"supports {name} in q's dtype {problem.dtype}, got {dtype}")
    if problem.functions.score is not None and differentiate(problem.functions).reads:
        reasons.append("has no gradients of captured arrays; computed by cpu, triton, numpy")
    return reasons
