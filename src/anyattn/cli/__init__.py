"""Command line `anyattn info | explain | verify | bench | tune | demo | run`. Only this package prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from . import bench, demo, explain, info, run, tune, verify

COMMANDS = (info, explain, verify, bench, tune, demo, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser, _ = parsers()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run is not demo.run:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    status: int = arguments.run(arguments)
    return status


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the program, and the parser of each command by name."""
    parser = argparse.ArgumentParser(prog="anyattn", description="Exact attention on any hardware in O(N) memory.")
    parser.add_argument("--version", action="version", version=f"anyattn {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers).set_defaults(run=command.run)
    return parser, dict(subparsers.choices)
