"""Other packages' surfaces over anyattn: the same import names, signatures and results."""

from .installation import Installation, install, install_flash_attn, uninstall

__all__ = ["Installation", "install", "install_flash_attn", "uninstall"]
