"""The backends: one row each, in the order of automatic choice.

A row says what must be known before a backend is loaded; its loader imports it at first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .base import Backend


class Row(NamedTuple):
    """A backend that exists, and how automatic choice treats it."""

    name: str
    load: Callable[[], Backend]
    offloads: bool = False  # computes arrays in host memory elsewhere: comes first where it does not avoid a problem
    missed: str = ""  # warning where it is not available; "": its absence is no surprise


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
