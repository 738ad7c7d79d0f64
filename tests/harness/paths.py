"""Folders of the repository that tests and their child processes need."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"


def python_path() -> str:
    """Return a PYTHONPATH with which a child process imports what this process imports, the harness included."""
    return os.pathsep.join([str(TESTS), *sys.path])
