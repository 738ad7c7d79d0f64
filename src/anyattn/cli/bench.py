"""`anyattn bench`: how fast, beside PyTorch's attention and plain attention, after a correctness gate."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="measure speed, memory and accuracy (needs torch)"
    )
    parser.add_argument("pattern", nargs="?", default="", help="only cases whose label contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long for each case (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speed and memory against length (needs matplotlib)"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    if find_spec("torch") is None:
        sys.stderr.write("anyattn bench needs torch: pip install torch\n")
        return 1
    from ..bench import report
    from ..bench.run import run as measure

    results = measure(arguments.pattern, arguments.seconds, whole=not arguments.pattern)
    print(report.table(results["cases"]))
    if arguments.json:
        report.write(results, arguments.json)
    if arguments.plot:
        report.plot(results, arguments.plot)
    wrong = [row for row in results["cases"] if "anyattn" in row["refused"]]
    return 1 if wrong else 0
