"""`anyattn demo`: runs examples/demo.py, which is installed with the package, in its own process."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDS = ("torch", "rich", "matplotlib")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    # No -h, so that the script's own help is shown.
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        usage="anyattn demo [option ...]",
        add_help=False,
        help="train a small GPT with anyattn and with PyTorch's attention, and compare them",
        description="Trains a small GPT twice, with anyattn and with PyTorch's own attention, and compares losses, "
        "speed and memory. Needs torch, rich and matplotlib. With --help it lists its options.",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"anyattn demo needs {', '.join(missing)}: pip install {' '.join(missing)}\n")
        return 1
    return subprocess.run([sys.executable, str(script()), *arguments.rest], check=False).returncode


def script() -> Path:
    """Return the script, installed next to the package's modules; in a source tree, two folders up."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "examples" / "demo.py"
    return installed if installed.exists() else package.parent.parent / "examples" / "demo.py"
