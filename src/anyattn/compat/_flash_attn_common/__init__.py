"""Shared parts of the flash_attn 2, 3 and 4 modules: their arguments in the terms of anyattn, and calls of it."""
