"""`anyattn tune`: measure the fastest tiles and the sizes worth offloading, and store them in the cache folder."""

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
        help="tune the backends for the GPU of this machine",
        description="Measures values for the GPU of this machine and writes them to the cache folder. Triton: the "
        "fastest tiles of its kernels, on a GPU that torch supports. Vulkan: the size from which the device is "
        "faster than the cpu backend, transfers included; automatic choice then offloads larger problems. Takes "
        "minutes, and should run on an otherwise idle machine.",
    )
    parser.add_argument("--backend", choices=tuple(NEEDS), help="tune one backend (default: all that are available)")
    parser.add_argument(
        "--seconds", type=_seconds, default=SECONDS, help="seconds of each measurement (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Tune the backends; return 1 if there is no device or a measurement fails. A failure writes nothing."""
    found: Found = {}
    missing, failed = [], []
    for name in (arguments.backend,) if arguments.backend else NEEDS:
        reasons = [f"{need} is not available: {reason}" for need in NEEDS[name] if (reason := _missing(need))]
        if reasons:
            missing.append(reasons[0])
            continue
        try:
            found[name] = TUNE[name](arguments.seconds)
        except (OSError, RuntimeError, MemoryError) as error:
            failed.append(f"{name}: {error}")
    for reason in failed if found or failed else missing:
        sys.stderr.write(f"anyattn tune: {reason}\n")
    if arguments.json and found:
        print(json.dumps(found, indent=1))
    else:
        for name in found:
            PRINT[name](found[name])
    return 0 if found and not failed else 1


def _missing(backend: str) -> str | None:
    return dispatch.get(backend).available()


def _tune_triton(seconds: float) -> Found:
    """Return the tiles and times before and after, for each phase, dtype and head size."""
    from ..backends.triton.device import cards
    from ..backends.triton.tuning import save_tiles
    from ..bench import tune_triton

    device, product, arch = cards()[0]
    results = []
    for workload in tune_triton.workloads(device):
        results.append(tune_triton.tune(workload, device, seconds))
        _progress(tune_triton.label(workload))
    _progress("")
    rows = [{**x._asdict(), "workload": tune_triton.label(x.workload)} for x in results]
    return {"device": product, "arch": arch, "tiles": rows, "path": str(save_tiles())}


def _print_triton(found: Found) -> None:
    print(f"{found['device']}, {found['arch']}: tiles of queries, of keys, warps, stages, stages of edges")
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


def _tune_vulkan(seconds: float) -> Found:
    """Return every point, the threshold of each (direction, dtype), and why a dtype was not measured."""
    from ..backends.vulkan import device, offload
    from ..bench import tune_vulkan

    info = device.instance().choose()
    dtypes = tune_vulkan.dtypes()
    every: list[Any] = []
    thresholds = {}
    for direction in DIRECTIONS:
        for dtype in (name for name, reason in dtypes.items() if not reason):
            points = []
            for point in tune_vulkan.measure_points(direction, dtype, seconds):
                points.append(point)
                _progress(f"{direction} {dtype}, {point.seqlen} queries")
            thresholds[direction, dtype] = tune_vulkan.find_threshold(points)
            every += points
    _progress("")
    path = offload.save_thresholds(info, thresholds)
    absent = {name: reason for name, reason in dtypes.items() if reason}
    chosen = {" ".join(key): offload.text(value) for key, value in thresholds.items()}
    chosen |= {name: f"{offload.text(offload.DEFAULT)}: not measured, {reason}" for name, reason in absent.items()}
    values = offload.as_json(thresholds)
    return {"device": info.name, "points": every, "crossover": values, "chosen": chosen, "path": str(path)}


def _print_vulkan(found: Found) -> None:
    rows = [
        (x.direction, x.dtype, str(x.seqlen), f"{1e3 * x.cpu:.2f}", f"{1e3 * x.vulkan:.2f}") for x in found["points"]
    ]
    print(table(("direction", "dtype", "seqlen", "cpu ms", "vulkan ms"), rows))
    print(f"\n{found['device']} is used from")
    for name, text in found["chosen"].items():
        print(f"  {name}: {text}")
    print(f"written to {found['path']}")


TUNE: dict[str, Callable[[float], Found]] = {"triton": _tune_triton, "vulkan": _tune_vulkan}
PRINT: dict[str, Callable[[Found], None]] = {"triton": _print_triton, "vulkan": _print_vulkan}


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
        raise argparse.ArgumentTypeError(f"must be seconds above 0 and up to 60, got {text!r}")
    return value
