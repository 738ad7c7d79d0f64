"""VulkanBackend: host arrays in, host arrays out; in between a GPU."""

from __future__ import annotations

from ... import settings
from ...kvcache import Append
from ...problem import Problem
from ..base import Call
from . import device as devices
from .api import VulkanError
from .engine import Engine, engine
from .forward import ForwardPlan, problem_launches, problem_regions
from .tuning import forward_config

DTYPES = ("float32", "float16", "bfloat16")
MAX_HEAD_DIM = 256


class VulkanBackend:
    """Attention through Vulkan compute shaders."""

    name = "vulkan"

    def available(self) -> str | None:
        try:
            info = devices.instance().choose()
        except VulkanError as error:
            return str(error)
        if info.software and not settings.current().vulkan_software:
            return f"{info.name} runs on the CPU, where the native engine is faster; ANYATTN_VULKAN_SOFTWARE=1 takes it"
        return info.refusal() or None

    def supports(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"takes arrays in host memory; q is on {problem.device}")
        if problem.dtype not in DTYPES:
            reasons.append(f"computes {', '.join(DTYPES)}; q is {problem.dtype}")
        for name in ("head_dim", "head_dim_v"):
            size = getattr(problem, name)
            if size > MAX_HEAD_DIM:
                reasons.append(f"{name} {size} > {MAX_HEAD_DIM}")
        if problem.dout is not None:
            reasons.append("has no backward yet")
        return reasons or self._limits(problem)

    def _limits(self, problem: Problem) -> list[str]:
        """What the device at hand cannot hold."""
        info = engine().device.info
        config = forward_config(info, problem)
        regions = problem_regions(problem, config.dim, config.dim_v)
        if not problem_launches(problem, regions, info.storage_range):
            return [f"one head of one array is larger than a binding of {info.name}: {info.storage_range} bytes"]
        largest = max(regions, key=lambda name: regions[name].nbytes)
        if regions[largest].nbytes > info.allocation:
            return [f"{largest} has {regions[largest].nbytes} bytes; {info.name} allocates {info.allocation} at most"]
        return []

    def plan(self, problem: Problem) -> ForwardPlan:
        return ForwardPlan(engine(), problem)

    def append(self, append: Append, call: Call) -> None:
        raise NotImplementedError("append")


__all__ = ["Engine", "VulkanBackend"]
