"""Drop-in replacements for other packages: the same import names, signatures and results, computed by anyattn."""

from .installation import Installation, install, install_flash_attn, uninstall

__all__ = ["Installation", "install", "install_flash_attn", "uninstall"]
