"""Arrays that stay on a Vulkan device between calls, and release of the memory that anyattn reserves there."""

from .backends.vulkan.device_array import DeviceArray
from .backends.vulkan.engine import release_memory

__all__ = ["DeviceArray", "release_memory"]
