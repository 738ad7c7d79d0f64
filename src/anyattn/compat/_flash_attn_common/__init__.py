"""Shared helpers of the flash_attn 2, 3 and 4 modules: convert their arguments and call anyattn."""
