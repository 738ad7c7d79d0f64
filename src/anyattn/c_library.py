"""Paths of the headers and the library for C and C++ programs."""

from __future__ import annotations

import os

from .config import package

HEADERS = ("anyattn.h", "anyattn.hpp")


def get_include() -> str:
    """Return the folder of `anyattn.h` (C99) and `anyattn.hpp` (C++17), to compile with `-I`.

    Both headers describe one library: attention on host memory, forward and backward, with packed sequences and KV
    caches. A CMake project whose `CMAKE_PREFIX_PATH` names the parent folder finds the package with
    `find_package(anyattn CONFIG)` and links `anyattn::anyattn`.

    Returns:
        The path of the folder.

    Raises:
        RuntimeError: the headers are not installed, because the native library was not built.

    >>> import os, anyattn
    >>> os.path.exists(os.path.join(anyattn.get_include(), "anyattn.h"))
    True
    """
    from .backends.cpu.library import LibraryError

    path = package.find("include")
    if path and all(os.path.exists(os.path.join(path, name)) for name in HEADERS):
        return path
    if package.archive():
        raise LibraryError(f"compilers cannot read the headers inside the archive {package.archive()}. Unpack it.")
    raise LibraryError(package.why_missing("the folder of the headers"))


def get_library() -> str:
    """Return the path of the native library to link with, which is the file that Python itself loads.

    A program that is built with this command finds the library again at run time:

        g++ -std=c++17 program.cpp -I$INCLUDE $LIBRARY -Wl,-rpath,$(dirname $LIBRARY)

    Returns:
        The path of the shared library: the one that `ANYATTN_LIBRARY` names, or the one installed with the package.

    Raises:
        RuntimeError: the library is missing, does not load, or has another version.

    >>> import os, anyattn
    >>> "anyattn" in os.path.basename(anyattn.get_library())
    True
    """
    from .backends.cpu import library

    return os.path.realpath(library.load().path)
