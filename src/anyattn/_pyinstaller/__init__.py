"""PyInstaller finds the hook of this package by the entry point `pyinstaller40` (pyproject.toml)."""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """Return the folder of `hook-anyattn.py`."""
    return [str(Path(__file__).parent)]
