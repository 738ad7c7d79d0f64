"""New Python processes, for tests of first imports, settings and crashes, which need a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from harness.paths import python_path


def run_python(
    *arguments: str | Path, without: tuple[str, ...] = (), timeout: float = 1800, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that can import the harness.

    without: prefixes of environment variables that the process does not inherit. variables: additional variables.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    environment |= {"PYTHONPATH": python_path(), **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which warnings are errors and no setting of anyattn is set."""
    return run_python("-W", "error", "-c", code, without=("ANYATTN_",))
