"""The Vulkan backend: attention on any GPU that has a Vulkan driver. Nothing here touches Vulkan when imported."""
