"""`anyattn tune`: measures what a GPU is worth and how it is used best, and keeps it in the user's cache folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from ..runtime import dispatch
from .table import table

SECONDS = 0.5  # for each measurement
DIRECTIONS = ("forward", "backward")
NEEDS = {"triton": ("triton",), "vulkan": ("cpu", "vulkan")}

Found = dict[str, Any]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure what suits the GPU of this machine",
        description="Measures, and writes into the cache folder: which tiles of the Triton kernels are the fastest on "
        "a GPU that torch reaches; and from which size on the Vulkan device in use is faster than the native engine, "
        "transfers included, so that automatic choice takes it from there on. Takes minutes, and runs best on a "
        "machine that does nothing else.",
    )
    parser.add_argument("--backend", choices=tuple(NEEDS), help="only this one (default: all that are available)")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help="for each measurement (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Status 1 where there is no device to measure, or where measuring fails, which writes nothing."""
    found: Found = {}
    missing, failed = [], []
    for name in (arguments.backend,) if arguments.backend else NEEDS:
        reasons = [f"{need} is not available: {reason}" for need in NEEDS[name] if (reason := _missing(need))]
        if reasons:
            missing.append(reasons[0])
            continue
        try:
            found[name] = MEASURED[name](arguments.seconds)
        except (OSError, RuntimeError, MemoryError) as error:
            failed.append(f"{name}: {error}")
    for reason in failed if found or failed else missing:
        sys.stderr.write(f"anyattn tune: {reason}\n")
    if arguments.json and found:
        print(json.dumps(found, indent=1))
    else:
        for name in found:
            PRINTED[name](found[name])
    return 0 if found and not failed else 1


def _missing(backend: str) -> str | None:
    return dispatch.get(backend).available()


def _tiles(seconds: float) -> Found:
    """Each phase, dtype and head size: the tiles and times before and now."""
    from ..backends.triton import measured
    from ..backends.triton.device import cards
    from ..bench import tiles

    device, product, arch = cards()[0]
    results = []
    for workload in tiles.workloads(device):
        results.append(tiles.tune(workload, device, seconds))
        _progress(tiles.label(workload))
    _progress("")
    rows = [{**x._asdict(), "workload": tiles.label(x.workload)} for x in results]
    return {"device": product, "arch": arch, "tiles": rows, "path": str(measured.save())}


def _print_tiles(found: Found) -> None:
    print(f"{found['device']}, {found['arch']}: tiles of rows, of keys, warps, stages, stages of edges")
    rows = [
        (
            row["workload"],
            *(" ".join(map(str, row[name])) for name in ("before", "tiles")),
            *(f"{1e3 * row[name]:.3f}" for name in ("seconds_before", "seconds")),
        )
        for row in found["tiles"]
    ]
    print(table(("", "before", "now", "ms before", "ms now"), rows))
    print(f"written to {found['path']}")


def _crossover(seconds: float) -> Found:
    """Every point, the crossover of each (direction, dtype), and why a dtype was not measured."""
    from ..backends.vulkan import crossover, device
    from ..bench import crossover as measuring

    info = device.instance().choose()
    dtypes = measuring.dtypes()
    every: list[Any] = []
    measured = {}
    for direction in DIRECTIONS:
        for dtype in (name for name, reason in dtypes.items() if not reason):
            points = []
            for point in measuring.points(direction, dtype, seconds):
                points.append(point)
                _progress(f"{direction} {dtype}, {point.seqlen} rows")
            measured[direction, dtype] = measuring.first(points)
            every += points
    _progress("")
    path = crossover.save(info, measured)
    absent = {name: reason for name, reason in dtypes.items() if reason}
    chosen = {" ".join(key): crossover.text(value) for key, value in measured.items()}
    chosen |= {name: f"{crossover.text(crossover.CAUTIOUS)}: not measured, {reason}" for name, reason in absent.items()}
    values = crossover.as_json(measured)
    return {"device": info.name, "points": every, "crossover": values, "chosen": chosen, "path": str(path)}


def _print_crossover(found: Found) -> None:
    rows = [
        (x.direction, x.dtype, str(x.seqlen), f"{1e3 * x.cpu:.2f}", f"{1e3 * x.vulkan:.2f}") for x in found["points"]
    ]
    print(table(("direction", "dtype", "seqlen", "cpu ms", "vulkan ms"), rows))
    print(f"\n{found['device']} is chosen from")
    for name, text in found["chosen"].items():
        print(f"  {name}: {text}")
    print(f"written to {found['path']}")


MEASURED: dict[str, Callable[[float], Found]] = {"triton": _tiles, "vulkan": _crossover}
PRINTED: dict[str, Callable[[Found], None]] = {"triton": _print_tiles, "vulkan": _print_crossover}


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
