"""Build backend: scikit-build-core, with a wheel without the native library if no compiler can build it.

scikit-build-core has a setting for this (`if.failed` in pyproject.toml), but the setting disables its metadata hooks. A
resolver that only needs metadata would then run the compiler.
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
    """Build a wheel of the package. It contains the native library unless the compiler fails."""
    return _build(build.build_wheel, directory, settings, metadata_directory)


def build_editable(directory: str, settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build an editable wheel. It contains the native library unless the compiler fails."""
    return _build(build.build_editable, directory, settings, metadata_directory)


def _build(hook: Callable[..., str], directory: str, settings: Settings, metadata_directory: str | None) -> str:
    try:
        return hook(directory, settings, metadata_directory)
    except SystemExit as failure:
        if failure.code != COMPILER_FAILED:
            raise
    # The tag of this wheel differs from the tag in metadata_directory, so that folder is not passed.
    wheel = hook(directory, {**(settings or {}), **WITHOUT_COMPILER}, None)
    print(NOTE)
    return wheel
