"""Results as JSON with the machine's header, as a table, and as plots drawn from the JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Results = dict[str, Any]


def header() -> Results:
    """What a reader needs to judge the figures."""
    from ..backends.cpu import library

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("anyattn", "numpy", "torch")},
        "cpu_target": library.load().target(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        values = {name.strip(): value.strip() for name, value in fields.items()}
        return f"{values.get('model name', '?')} (family {values.get('cpu family')}, model {values.get('model')})"
    return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(rows: Iterable[Results]) -> str:
    """Useful GFLOP/s of every provider, their share of the measured ceiling, and our ratio to each of the others."""
    lines = [f"{'case':44} {'provider':16} {'ms':>9} {'GFLOP/s':>9} {'of peak':>7} {'anyattn is':>11}"]
    for row in rows:
        ours = row["seconds"].get("anyattn", {}).get("median")
        for name, timing in row["seconds"].items():
            ratio = f"{timing['median'] / ours:.2f}x" if ours and name != "anyattn" else ""
            rate = row["flops"] / timing["median"]
            shown = f"{timing['median'] * 1e3:9.3f} {rate / 1e9:9.1f} {rate / row['peak_flops']:7.0%} {ratio:>11}"
            lines.append(f"{row['label']:44} {name:16} {shown}")
        lines.extend(f"{row['label']:44} {name:16} refused: {why}" for name, why in row["refused"].items())
    return "\n".join(lines)


def write(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def plot(results: Results, path: Path) -> None:
    """Speed against length, forward and backward, and peak extra memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, backward in zip(axes, (False, True), strict=False):
        rows = [row for row in results["cases"] if row["name"].startswith("length") and row["backward"] == backward]
        for name in rows[0]["seconds"] if rows else ():
            points = [(row["seqlen"], row["flops"] / row["seconds"][name]["median"] / 1e9) for row in rows]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=f"{'backward' if backward else 'forward'}, causal float32, 8 heads of 64", ylim=(0, None))
        axis.set(ylabel="useful GFLOP/s")
    for name, points in results["memory"].items():
        lengths = [int(length) for length in points]
        axes[2].plot(lengths, [used["backward"] for used in points.values()], marker="o", label=name)
    axes[2].set(title="peak extra memory, forward and backward", ylabel="MiB", yscale="log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("sequence length")
        axis.legend()
    machine = results["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores, {machine['date']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def progress(text: str) -> None:
    sys.stderr.write(f"\r{text:78}")
    sys.stderr.flush()
