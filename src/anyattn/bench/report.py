"""Results as JSON with a description of the machine, and as tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.machine import processor
from . import goals
from .memory import LENGTHS
from .providers import Provider
from .score_functions import ARGUMENT, FLEX, FUNCTION

Results = dict[str, Any]
OURS = "anyattn"


class Table(NamedTuple):
    """Table of text."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def header(threads: int, providers: Iterable[Provider] = ()) -> Results:
    """Return the description of the machine that a reader needs to judge the results."""
    from ..backends.cpu import library

    packages = dict.fromkeys(["anyattn", "numpy", "torch", *(provider.package for provider in providers)])
    try:
        target: str | None = library.load().target_summary()
    except library.LibraryError:
        target = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cpu_target": target,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def notes(results: Results) -> Iterator[str]:
    """Yield the machine, absent providers with reasons, and wrong or refused results, each reason once."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    threads = machine.get("threads", machine["cores"])
    yield f"{machine['processor']}, {machine['cores']} cores, {threads} threads, {machine['cpu_target']}, {versions}"
    for name, reason in results.get("absent", {}).items():
        yield f"absent: {name}: {reason}"
    for row in results["cases"]:
        for name, problem in row.get("wrong", {}).items():
            yield f"WRONG, not timed: {name}: {row['label']}: {problem}"
    counted: dict[tuple[str, str], int] = {}
    for row in results["cases"]:
        for key in row["refused"].items():
            counted[key] = counted.get(key, 0) + 1
    for (name, reason), count in counted.items():
        yield f"refused: {name}: {reason} ({count} case{'s' if count > 1 else ''})"


def tables(results: Results) -> Iterator[Table]:
    """Yield a table for every measured section."""
    for suite in dict.fromkeys(row.get("suite", "") for row in results["cases"]):
        rows = [row for row in results["cases"] if row.get("suite", "") == suite]
        yield Table(suite or "cases", _CASES, [line for row in rows for line in _case(row)])
    for name, section in _SECTIONS.items():
        if results.get(name):
            yield from section(results[name])
    reached = goals_table(results)
    if reached:
        yield reached


def goals_table(results: Results) -> Table | None:
    """Return the CPU goals compared with the measurements; None if nothing was measured."""
    found = [goal for goal in goals.goals(results) if goal.value is not None]
    rows = []
    for goal in found:
        show = "{:.0%}".format if goal.quantity in _SHARES else "{:.2f}".format
        aim = "" if goal.aim is None else show(goal.aim)
        sign = "<= " if goal.at_most else ""
        rows.append(
            (goal.workload, goal.quantity, show(goal.value), sign + show(goal.must), aim and sign + aim, goal.verdict)
        )
    return Table("goals", ("workload", "quantity", "measured", "must", "aim", "reached"), rows) if rows else None


_SHARES = {
    "share",
    "of neighbours",
    "of stream read",
    "of contiguous",
    "of the dense rate",
    "of the speed without",
    "over plain",
}
_CASES = ("case", "ms", "spread", "GFLOP/s", "of peak", "GB/s", "of read", "anyattn is")


def _case(row: Results) -> Iterator[tuple[str, ...]]:
    """Yield a line for the workload and one per provider; GB/s of K and V if reading them dominates."""
    name = row["label"] if row["label"].startswith(row["name"]) else f"{row['name']}: {row['label']}"
    yield (name, *[""] * (len(_CASES) - 1))
    ours = row["seconds"].get(OURS, {}).get("median")
    for provider, timing in row["seconds"].items():
        median = timing["median"]
        rate, read = row["flops"] / median, row.get("kv_bytes", 0) / median
        stream, peak = row.get("stream_bytes"), row["peak_flops"]
        yield (
            f"  {provider}",
            f"{median * 1e3:.3f}",
            f"{(timing['high'] - timing['low']) / median:.0%}",
            f"{rate / 1e9:.1f}",
            f"{rate / peak:.0%}" if peak else "",
            f"{read / 1e9:.1f}" if stream else "",
            f"{read / stream:.0%}" if stream else "",
            f"{median / ours:.2f}x" if ours and provider != OURS else "",
        )


def _features(section: Results) -> Iterator[Table]:
    for dtype, timings in section.items():
        plain = timings["plain"]["median"]
        rows = [
            (name, f"{timing['median'] * 1e3:.3f}", f"{timing['median'] / plain - 1:+.1%}")
            for name, timing in timings.items()
        ]
        yield Table(f"features, (1, 8, 2048, 64) {dtype} forward", ("feature", "ms", "over plain"), rows)


def _small(section: Results) -> Iterator[Table]:
    for shape, timings in section.items():
        rows = [(name, f"{timing['median'] * 1e6:.1f}") for name, timing in timings.items()]
        yield Table(f"small calls, {shape} float32 forward", ("call", "us"), rows)


def _first(section: Results) -> Iterator[Table]:
    columns = ("import", "first", "second")
    rows = [(kind, *(f"{times[name] * 1e3:.1f}" for name in columns)) for kind, times in section.items()]
    yield Table("a fresh process, ms", ("arrays", "import anyattn", "first call", "second call"), rows)


def _interleaving(section: Results) -> Iterator[Table]:
    rows = []
    for name, title in (("attention", "attention (1, 8, 512, 64)"), ("mm", "torch.mm (512)")):
        alone, after = section[name]["median"], section[f"{name} after"]["median"]
        rows.append((title, f"{alone * 1e3:.3f}", f"{after * 1e3:.3f}", f"{after / alone:.2f}x"))
    yield Table("next to a torch operation, ms", ("operation", "alone", "right after the other", "ratio"), rows)


def _memory(section: Any) -> Iterator[Table]:
    names = list(dict.fromkeys(name for row in memory_rows(section) for name in row["mib"]))
    rows = [
        (row["label"], *(f"{row['mib'][name]:.1f}" if name in row["mib"] else "-" for name in names))
        for row in memory_rows(section)
    ]
    yield Table("peak MiB beyond inputs and results", ("case", *names), rows)


def _derivatives(section: list[Results]) -> Iterator[Table]:
    rows = []
    for row in section:
        for provider, used in row["mib"].items():
            seconds = row["seconds"].get(provider)
            time = "wrong" if row["wrong"] else f"{seconds['median'] * 1e3:.1f}"
            rows.append((row["description"], provider, time, f"{used:.1f}"))
    shape = tuple(section[0]["shape"])
    yield Table(f"derivatives, {shape} float32", ("pass", "provider", "ms", "extra MiB"), rows)


def _score_functions(section: dict[str, list[Results]]) -> Iterator[Table]:
    rows = []
    for row in section["functions"]:
        medians = {provider: one["median"] for provider, one in row["seconds"].items()}
        times = [f"{medians[name] * 1e3:.1f}" if name in medians else "-" for name in (FUNCTION, ARGUMENT, FLEX)]
        ratio = row["wrong"] or f"{medians[FUNCTION] / medians[ARGUMENT]:.2f}x"
        rows.append((row["name"], row["compared with"], f"{row['dtype']} {row['pass']}", *times, ratio))
    header = ("function", "compared with", "pass", "function ms", "argument ms", "flex_attention ms", "ratio")
    yield Table(f"score functions, {tuple(section['functions'][0]['shape'])}", header, rows)
    masks = [
        (str(row["length"]), *(f"{x * 1e3:.0f}" if x else "-" for x in map(row["seconds"].get, ("anyattn", "torch"))))
        for row in section["masks"]
    ]
    yield Table("block mask of causal documents, ms", ("length", "anyattn", "torch create_block_mask"), masks)


def _accuracy(section: list[Results]) -> Iterator[Table]:
    names = list(section[0]["errors"])
    rows = [(row["dtype"], *(f"{row['errors'][name]:.1e}" for name in names)) for row in section]
    yield Table("largest error against float64, (1, 8, 512, 64)", ("dtype", *names), rows)


_SECTIONS = {
    "features": _features,
    "small_calls": _small,
    "first_call": _first,
    "citizen": _interleaving,
    "memory": _memory,
    "derivatives": _derivatives,
    "score_functions": _score_functions,
    "accuracy": _accuracy,
}


def memory_rows(section: Any) -> list[Results]:
    """Return the rows of the memory section. Version 0.1 stored provider -> length -> MiB including the results."""
    if isinstance(section, list):
        return section
    return [
        {
            "label": f"(1, 8, {n}, 64) float32 causal {direction}",
            "seqlen_q": n,
            "causal": True,
            "dtype": "float32",
            "backward": direction == "backward",
            "mib": {name: used[str(n)][direction] for name, used in section.items()},
        }
        for n in LENGTHS
        for direction in ("forward", "backward")
    ]
