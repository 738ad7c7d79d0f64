"""Fresh Python processes, for what this process can no longer show: first imports, settings, crashes."""

from __future__ import annotations

import os
import subprocess
import sys


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, where warnings are errors and none of this project's settings is set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANYATTN_")}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=environment)
