"""Install this machine's wheel from dist/ in a new environment with only NumPy, and run `anyattn verify` there.

This script needs only Python, so that it can try the wheels of other systems on those systems.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIST = Path(__file__).resolve().parent.parent / "dist"


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="anyattn-wheel-"))
    try:
        return try_in(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_in(folder: Path) -> int:
    run(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary=:all:")
    start = time.perf_counter()
    run(*install, "numpy")
    numpy = time.perf_counter()
    run(*install, "--no-index", "--find-links", DIST, "anyattn")
    end = time.perf_counter()
    print(f"installed in {end - start:.1f} s, {numpy - start:.1f} s of it NumPy", flush=True)
    # `info` fails without the CPU engine, and `verify` fails if a number is wrong.
    for command in ("info", "verify"):
        run(python, "-m", "anyattn", command, cwd=folder, require="cpu")
    return 0


def run(*command: str | Path, cwd: Path | None = None, require: str = "") -> None:
    ours = ("ANYATTN_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    subprocess.run(command, cwd=cwd, env={**environment, "ANYATTN_REQUIRE": require}, check=True)


if __name__ == "__main__":
    sys.exit(main())
