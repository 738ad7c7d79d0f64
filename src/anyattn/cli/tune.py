"""`anyattn tune`: measures from which size on this machine's GPU is faster than its processor, and keeps it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .. import dispatch
from .table import table

DIRECTIONS = ("forward", "backward")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure from which size on the GPU is faster",
        description="Measures from which size on the Vulkan device in use is faster than the native engine, transfers "
        "included, and writes it into the cache folder: automatic choice takes the device from there on. Runs best on "
        "a machine that does nothing else.",
    )
    parser.add_argument("--seconds", type=_seconds, default=0.5, help="for each size (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Status 1, and nothing is written, where there is no device or no native engine to measure."""
    for name in ("cpu", "vulkan"):
        missing = dispatch.get(name).available()
        if missing:
            sys.stderr.write(f"anyattn tune: {name} is not available: {missing}\n")
            return 1
    from ..backends.vulkan import crossover, device

    info = device.instance().choose()
    try:
        points, measured, absent = _measure(arguments.seconds)
        path = crossover.save(info, measured)
    except (OSError, RuntimeError, MemoryError) as error:
        sys.stderr.write(f"anyattn tune: {error}\n")
        return 1
    if arguments.json:
        found = {"device": info.name, "points": points, "crossover": crossover.as_json(measured), "path": str(path)}
        print(json.dumps(found, indent=1))
        return 0
    rows = [(x.direction, x.dtype, str(x.seqlen), f"{1e3 * x.cpu:.2f}", f"{1e3 * x.vulkan:.2f}") for x in points]
    print(table(("direction", "dtype", "seqlen", "cpu ms", "vulkan ms"), rows))
    print(f"\n{info.name} is chosen from")
    for (direction, dtype), value in measured.items():
        print(f"  {direction} {dtype}: {crossover.text(value)}")
    for dtype, reason in absent.items():
        print(f"  {dtype}: {crossover.text(crossover.CAUTIOUS)}: not measured, {reason}")
    print(f"written to {path}")
    return 0


def _measure(seconds: float) -> tuple[list[Any], dict[tuple[str, str], Any], dict[str, str]]:
    """Every point, the crossover of each (direction, dtype), and why a dtype was not measured."""
    from ..bench import crossover

    dtypes = crossover.dtypes()
    every: list[Any] = []
    measured = {}
    for direction in DIRECTIONS:
        for dtype in (name for name, reason in dtypes.items() if not reason):
            found = []
            for point in crossover.points(direction, dtype, seconds):
                found.append(point)
                _progress(f"{direction} {dtype}, {point.seqlen} rows")
            measured[direction, dtype] = crossover.first(found)
            every += found
    _progress("")
    return every, measured, {name: reason for name, reason in dtypes.items() if reason}


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text[:78]:78}\r")
        sys.stderr.flush()


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and up to 60")
    return value
