"""The build backend: scikit-build-core, and a wheel without the native library where no compiler makes it.

scikit-build-core's own way to do that (`if.failed` in pyproject.toml) takes its metadata hooks away. A resolver that
asks for metadata alone would then call the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403 -- every other hook is scikit-build-core's

COMPILER_FAILED = 1  # scikit-build-core's exit status; others say that the settings are wrong
WITHOUT_COMPILER = {"wheel.cmake": "false", "wheel.platlib": "false"}
NOTE = """
*** The native library was not built: no C++ compiler was found, or it failed (see above).
*** anyattn is installed without it and computes with NumPy, which is slower. Install g++ or clang++, then:
***     pip install --no-cache-dir --force-reinstall --no-deps anyattn
"""

Settings = dict[str, Any] | None


def build_wheel(directory: str, settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build a wheel of the package and its native library; without the library if the compiler fails."""
    return _build(build.build_wheel, directory, settings, metadata_directory)


def build_editable(directory: str, settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build an editable wheel; without the native library if the compiler fails."""
    return _build(build.build_editable, directory, settings, metadata_directory)


def _build(hook: Callable[..., str], directory: str, settings: Settings, metadata_directory: str | None) -> str:
    try:
        return hook(directory, settings, metadata_directory)
    except SystemExit as failure:
        if failure.code != COMPILER_FAILED:
            raise
    wheel = hook(directory, {**(settings or {}), **WITHOUT_COMPILER}, None)  # the tag differs from the metadata's
    print(NOTE)
    return wheel
