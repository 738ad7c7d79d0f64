"""`flash_attn.modules`."""
