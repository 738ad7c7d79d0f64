"""Drop-in replacement for flash_attn 4, upstream `flash_attn.cute` with the submodule `interface`."""

from .interface import flash_attn_combine, flash_attn_func, flash_attn_varlen_func, get_scheduler_metadata

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_varlen_func", "get_scheduler_metadata"]
