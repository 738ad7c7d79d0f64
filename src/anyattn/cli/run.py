"""`anyattn run script.py ...`: a program, unchanged, that finds anyattn where it imports flash_attn."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from ..compat import installation


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a program whose `import flash_attn` finds anyattn",
        usage="anyattn run [--as NAME] [--force] (script.py | -m module) [argument ...]",
        description="Runs a Python program as `python` would, after anyattn.compat.install. Processes that it starts "
        "anew are not served; forked ones are.",
    )
    parser.add_argument(
        "--as",
        dest="names",
        action="append",
        choices=list(installation.NAMES),
        metavar="NAME",
        help=f"serve this import name alone (may be repeated): {', '.join(installation.NAMES)}. "
        "Default: flash_attn, and each of the others that no other module has",
    )
    parser.add_argument("--force", action="store_true", help="also where a package of that name can be imported")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module, as with `python -m`")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="script or module, and its arguments")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """The program's exit status is that of the process: SystemExit and other exceptions pass."""
    if not arguments.program:
        sys.stderr.write("anyattn run needs a script, or -m and a module\n")
        return 2
    program = arguments.program[0]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path.cwd() if arguments.module else Path(program).resolve().parent)
    try:
        installation.install(*(arguments.names or _default(arguments.force)), force=arguments.force)
    except ImportError as error:
        sys.stderr.write(f"anyattn run: {error}\n")
        return 2
    sys.argv = list(arguments.program)
    if arguments.module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")
    return 0


def _default(force: bool) -> list[str]:
    """flash_attn whatever there is, which may be refused; the rest where the name is free."""
    others = [name for name in installation.NAMES if name != "flash_attn"]
    return ["flash_attn", *(name for name in others if force or not installation.importable(name))]
