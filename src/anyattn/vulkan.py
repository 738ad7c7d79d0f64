"""Arrays that stay on a Vulkan device between calls, and the memory that is kept there."""

from .backends.vulkan.device_array import DeviceArray
from .backends.vulkan.engine import release_memory

__all__ = ["DeviceArray", "release_memory"]
