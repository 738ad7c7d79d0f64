"""Backends, one row each, in the order of automatic choice.

A row holds what must be known before a backend is loaded. Its loader imports the backend at first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .base import Backend


class Row(NamedTuple):
    """Available backend and its treatment by automatic choice."""

    name: str
    load: Callable[[], Backend]
    offloads: bool = False  # computes host arrays on another device; tried first unless it avoids the problem
    missed: str = ""  # warning if it is not available; "": no warning


def _cpu() -> Backend:
    from .cpu.backend import CpuBackend

    return CpuBackend()


def _triton() -> Backend:
    from .triton.backend import TritonBackend

    return TritonBackend()


def _vulkan() -> Backend:
    from .vulkan.backend import VulkanBackend

    return VulkanBackend()


def _numpy() -> Backend:
    from .numpy.backend import NumpyBackend

    return NumpyBackend()


ROWS = (
    Row("cpu", _cpu, missed="anyattn uses its slower NumPy backend"),
    Row("triton", _triton),
    Row("vulkan", _vulkan, offloads=True),
    Row("numpy", _numpy),
)
