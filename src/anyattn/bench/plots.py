"""Plots of the JSON results: speed against length, a roofline, memory against length, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .report import OURS, Results, memory_rows

INCHES = (6.4, 4.4)
MOST_IN_A_LINE = 3


def plot(results: Results, path: Path, names: Sequence[str] = (), *, source: str = "") -> list[Path]:
    """Write one picture with every panel if `path` has a picture suffix, else one picture per panel in a folder.

    Args:
        results: results of a run.
        path: a picture or a folder.
        names: the panels; default: all panels with data.
        source: text for the metadata of the pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {name: draw for name, draw in PANELS.items() if DATA[name](results) and name in (names or PANELS)}
    files = {path / f"{name}.png": {name: draw} for name, draw in panels.items()} if not path.suffix else {path: panels}
    return [_save(results, drawn, file, source, pyplot) for file, drawn in files.items() if drawn]


def _save(results: Results, panels: dict[str, Any], path: Path, source: str, pyplot: Any) -> Path:
    width, height = INCHES
    columns = len(panels) if len(panels) <= MOST_IN_A_LINE else 2
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, height * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, draw in zip(axes.flat, panels.values(), strict=False):
        draw(results, axis)
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8)
    machine = results["machine"]
    threads = machine.get("threads", machine["cores"])
    figure.suptitle(
        f"{machine['processor']}, {threads} threads, {machine['cpu_target']}, {machine['date']}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": source} if path.suffix == ".png" else None)
    pyplot.close(figure)
    return path


def _lengths(results: Results, backward: bool) -> list[Results]:
    return [row for row in results["cases"] if row["name"].startswith("length") and row["backward"] == backward]


def _speed(backward: bool) -> Callable[[Results, Any], None]:
    def draw(results: Results, axis: Any) -> None:
        rows = _lengths(results, backward)
        for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
            selected = [row for row in rows if name in row["seconds"]]
            x = [row.get("seqlen_q", row.get("seqlen")) for row in selected]
            axis.plot(x, [row["flops"] / row["seconds"][name]["median"] / 1e9 for row in selected], **_style(name))
        peaks = [row["peak_flops"] / 1e9 for row in rows if row["peak_flops"]]
        if peaks:
            axis.axhline(max(peaks), color="gray", linestyle=":", label="peak (registers only)")
        axis.set_title(_speed_title(rows[-1], "Backward" if backward else "Forward"))
        axis.set(ylabel="useful GFLOP/s, causal float32, 8 heads of 64", xlabel="sequence length", ylim=(0, None))
        _lengths_axis(axis)

    return draw


def _speed_title(row: Results, pass_: str) -> str:
    """Say the result: how many times PyTorch's speed the longest case reaches."""
    seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
    length = row.get("seqlen_q", row.get("seqlen"))
    if "torch SDPA" not in seconds or OURS not in seconds:
        return pass_
    return f"{pass_}: {seconds['torch SDPA'] / seconds[OURS]:.1f} times PyTorch's speed at {length:,} tokens"


def _roofline(results: Results, axis: Any) -> None:
    """Draw each workload at its arithmetic intensity, below the two measured limits."""
    import numpy as np

    rows = _intense(results)
    colors = {"float32": "C0", "bfloat16": "C1", "float16": "C2", "float64": "C3"}
    stream = max((row["stream_bytes"] for row in rows if row.get("stream_bytes")), default=None)
    x = np.geomspace(0.25, 4096, 64)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        selected = [row for row in rows if row["dtype"] == dtype]
        for backward, marker in ((False, "o"), (True, "^")):
            points = [
                (row["flops"] / row["bytes"], row["flops"] / row["seconds"][OURS]["median"] / 1e9)
                for row in selected
                if row["backward"] == backward
            ]
            if points:
                label = f"{dtype} {'backward' if backward else 'forward'}"
                style = {"color": colors[dtype], "marker": marker, "linestyle": "", "alpha": 0.6, "label": label}
                axis.plot(*zip(*points, strict=True), **style)
        peak = max((row["peak_flops"] for row in selected if row["peak_flops"]), default=None)
        if peak:
            roof = np.minimum(x * stream, peak) if stream else np.full_like(x, peak)
            axis.plot(x, roof / 1e9, color=colors[dtype], linewidth=1)
    axis.set(title=_roofline_title(rows), xscale="log", yscale="log")
    axis.set(xlabel="useful operations per byte of inputs and outputs", ylabel="useful GFLOP/s")


def _roofline_title(rows: list[Results]) -> str:
    """Say the result: the largest share of the measured peak that a case reaches."""
    shares = [row["flops"] / row["seconds"][OURS]["median"] / row["peak_flops"] for row in rows if row["peak_flops"]]
    return f"{OURS} reaches up to {max(shares):.0%} of the peak" if shares else f"{OURS}: speed of every case"


def _memory(results: Results, axis: Any) -> None:
    rows = _memory_by_length(results)
    for name in dict.fromkeys(name for row in rows for name in row["mib"]):
        selected = [row for row in rows if name in row["mib"]]
        axis.plot(
            [row["seqlen_q"] for row in selected], [max(row["mib"][name], 0.1) for row in selected], **_style(name)
        )
    last = rows[-1]["mib"]
    title = f"Memory grows with the length: {last[OURS]:.0f} MiB at {rows[-1]['seqlen_q']:,} tokens"
    axis.set(title=title, ylabel="extra MiB of forward and backward, causal float32", yscale="log")
    axis.set(xlabel="sequence length")
    _lengths_axis(axis)


def _accuracy(results: Results, axis: Any) -> None:
    rows = results["accuracy"]
    for i, name in enumerate(names := list(rows[0]["errors"])):
        x = [j + (i - (len(names) - 1) / 2) * 0.25 for j in range(len(rows))]
        axis.bar(x, [row["errors"][name] for row in rows], width=0.23, label=name)
    axis.set(title="Error compared with float64: no larger than PyTorch's", yscale="log")
    axis.set(ylabel="largest absolute error, (1, 8, 512, 64)")
    axis.set_xticks(range(len(rows)), [row["dtype"] for row in rows])


def _memory_by_length(results: Results) -> list[Results]:
    rows = memory_rows(results.get("memory") or [])
    return [row for row in rows if row["causal"] and row["backward"] and row["dtype"] == "float32"]


def _intense(results: Results) -> list[Results]:
    return [row for row in results["cases"] if row.get("bytes") and OURS in row["seconds"]]


def _style(name: str) -> dict[str, Any]:
    return {"label": name, "marker": "o", "linewidth": 2.2 if name == OURS else 1.2, "markersize": 4}


def _lengths_axis(axis: Any) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")


PANELS: dict[str, Callable[[Results, Any], None]] = {
    "forward": _speed(False),
    "backward": _speed(True),
    "roofline": _roofline,
    "memory": _memory,
    "accuracy": _accuracy,
}
DATA: dict[str, Callable[[Results], Any]] = {
    "forward": lambda results: _lengths(results, False),
    "backward": lambda results: _lengths(results, True),
    "roofline": _intense,
    "memory": _memory_by_length,
    "accuracy": lambda results: results.get("accuracy"),
}
CAPTIONS: dict[str, str] = {
    "forward": "speed of the forward pass by sequence length, anyattn and others",
    "backward": "speed of the backward pass by sequence length, anyattn and others",
    "roofline": "speed of every benchmark case, below the measured limits of arithmetic and memory",
    "memory": "extra memory of forward and backward by sequence length",
    "accuracy": "largest error compared with float64, by dtype",
}
