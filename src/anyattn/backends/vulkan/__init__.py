"""Vulkan backend: attention on any GPU with a Vulkan driver. Importing it does not load Vulkan."""
