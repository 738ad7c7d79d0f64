"""The surface of flash_attn 4 on anyattn; upstream it is `flash_attn.cute`, and `interface` its submodule."""

from .interface import flash_attn_combine, flash_attn_func, flash_attn_varlen_func, get_scheduler_metadata

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_varlen_func", "get_scheduler_metadata"]
