"""Arrays that stay on a Vulkan device between calls: uploaded once, computed with there, downloaded on demand."""

from .backends.vulkan.device_array import DeviceArray

__all__ = ["DeviceArray"]
