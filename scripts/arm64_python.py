"""Unpack a Python for 64-bit Arm and the packages that the tests need. qemu runs it on another processor.

python scripts/arm64_python.py [FOLDER]   unpacks to FOLDER (build/arm64-python)

Needs apt-get, dpkg, qemu-aarch64 and access to PyPI. FOLDER/python COMMAND... runs the Python. It cannot start child
processes with sys.executable, because this system has no loader for arm64 programs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from debian import command, only, unpack

ROOT = Path(__file__).resolve().parent.parent
SUITE = "trixie"
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
SCRIPT = """#!/bin/sh
# made by scripts/arm64_python.py
export PYTHONPATH="{packages}${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONHOME='{root}/usr'
exec qemu-aarch64 -L '{root}' '{python}' "$@"
"""


def main() -> int:
    folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT / "build" / "arm64-python"
    if (folder / "python").exists():
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    try:
        install(folder)
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"no Python for 64-bit Arm: {error}\n")
        return 1
    return 0


def install(folder: Path) -> None:
    root, packages = folder / "root", folder / "packages"
    unpack(root, (SUITE,), PACKAGES, architecture="arm64")
    (root / "lib").symlink_to("usr/lib")
    python = only(root, "usr/bin/python3.*")
    wheels = [f"--platform={platform}" for platform in PLATFORMS]
    version = f"--python-version={python.name.removeprefix('python')}"
    requirements = ROOT / "requirements" / "numpy.txt"
    command(sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *wheels, version,
            "--target", packages, "-r", requirements)  # fmt: skip
    script = folder / "python"
    script.write_text(SCRIPT.format(packages=packages, root=root, python=python), encoding="utf-8")
    script.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
