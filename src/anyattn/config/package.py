"""Files that are installed with the package: native library, headers and shaders.

The package may be installed, editable (several folders), vendored under another name, inside a zip archive, or frozen.
"""

from __future__ import annotations

import os
import sys

NAME = __name__.rpartition(".")[0].rpartition(".")[0]  # "anyattn", or the name that a vendored copy has
INSTALL = "pip install --no-cache-dir --force-reinstall --no-deps anyattn"


def find(*parts: str) -> str:
    """Return the path of a file or folder of the package; "" if it is missing, or inside an archive."""
    for folder in _folders():
        path = os.path.join(folder, *parts)
        if os.path.exists(path):
            return path
    return ""


def read(*parts: str) -> bytes:
    """Return the content of a file of the package, from an archive too.

    Raises:
        OSError: it is missing.
    """
    if archive():
        content: bytes = sys.modules[NAME].__loader__.get_data(os.path.join(_folders()[0], *parts))  # type: ignore[union-attr]
        return content
    with open(find(*parts) or os.path.join(_folders()[0], *parts), "rb") as file:
        return file.read()


def archive() -> str:
    """Return the path of the zip archive that the package was imported from; "" if it is in a folder."""
    loader = sys.modules[NAME].__loader__
    return str(getattr(loader, "archive", "")) if hasattr(loader, "get_data") else ""


def why_missing(what: str) -> str:
    """Return why something that the build makes is missing, and what to do."""
    if getattr(sys, "frozen", False):
        return (
            f"{what} is not in this frozen program. PyInstaller collects it with the hook that anyattn installs. "
            "Other freezers must be told to include the data files of the package"
        )
    if archive():
        return f"{what} is not in the archive {archive()}. Add the folder lib of an installed anyattn to it"
    if "." in NAME or find("include"):
        where = _folders()[0]
        return f"{what} is not in this copy of the package ({where}). Add the folder lib of an installed anyattn to it"
    return (
        f"{what} is not installed: when the package was built, no C++ compiler was found, or it failed. "
        f"Install g++ or clang++, then: {INSTALL}"
    )


def _folders() -> list[str]:
    return list(sys.modules[NAME].__path__)
