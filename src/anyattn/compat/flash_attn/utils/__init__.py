"""`flash_attn.utils`."""
