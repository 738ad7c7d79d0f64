"""Exceptions of anyattn: the public name of `anyattn.definition.errors`."""

from .definition.errors import CacheOverflow, CompilationError, DeviceError, DeviceMemoryError, UnsupportedProblem

__all__ = ["CacheOverflow", "CompilationError", "DeviceError", "DeviceMemoryError", "UnsupportedProblem"]
