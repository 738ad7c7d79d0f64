"""Folders of the repository that tests and their child processes need."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"


def python_path() -> str:
    """Return a PYTHONPATH with which a child process imports the harness, before what this process was given."""
    return os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
