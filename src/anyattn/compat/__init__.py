"""Other packages' surfaces over anyattn: the same import names, signatures and results."""
