"""`flash_attn.ops`."""
