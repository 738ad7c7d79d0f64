"""`anyattn run script.py ...`: runs an unchanged program whose `import flash_attn` returns anyattn's module."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from ..compat import children, installation


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a program that imports flash_attn or a similar package, with anyattn in its place",
        usage="anyattn run [--as NAME] [--force] (script.py | -m module) [argument ...]",
        description="Runs a Python program as `python` would. Imports of flash_attn and similar packages find anyattn, "
        "also in Python processes that the program starts (multiprocessing, torchrun, sys.executable), unless they "
        "ignore PYTHONPATH.",
    )
    parser.add_argument(
        "--as",
        dest="names",
        action="append",
        choices=list(installation.NAMES),
        metavar="NAME",
        help=f"provide only this import name (may be repeated): {', '.join(installation.NAMES)}. "
        "Default: flash_attn, and each other name that no installed package has",
    )
    parser.add_argument("--force", action="store_true", help="hide an installed package of that name")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module, as with `python -m`")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="script or module, and its arguments")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the program. Its exit status is the process's, because SystemExit and other exceptions are not caught."""
    if not arguments.program:
        sys.stderr.write("anyattn run needs a script, or -m and a module\n")
        return 2
    program = arguments.program[0]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path.cwd() if arguments.module else Path(program).resolve().parent)
    try:
        names = arguments.names or _default(arguments.force)
        installation.install(*names, force=arguments.force)
    except ImportError as error:
        sys.stderr.write(f"anyattn run: {error}\n")
        return 2
    sys.argv = list(arguments.program)
    with children.served(names, arguments.force):
        if arguments.module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    return 0


def _default(force: bool) -> list[str]:
    """Return flash_attn, which `install` may refuse, and the other names that are free."""
    others = [name for name in installation.NAMES if name != "flash_attn"]
    return ["flash_attn", *(name for name in others if force or not installation.importable(name))]
