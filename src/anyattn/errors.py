"""Exceptions of anyattn in addition to ValueError and TypeError, which wrong arguments raise."""

from .definition.errors import CacheOverflow, CompilationError, DeviceError, DeviceMemoryError, UnsupportedProblem

__all__ = ["CacheOverflow", "CompilationError", "DeviceError", "DeviceMemoryError", "UnsupportedProblem"]
