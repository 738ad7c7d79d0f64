"""`anyattn bench`: speed compared with other libraries, after a correctness gate, and relative to measured limits."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import settings
from . import tune
from .table import table

QUICK_SECONDS = 0.3


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure speed, memory and accuracy and compare with other libraries (needs torch)",
        description="Measures speed, memory and accuracy of anyattn and of other installed libraries on this machine. "
        "Every result is compared with float64 before it is timed.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases and shorter sections, in less than two minutes")
    add("--suite", default="", metavar="A,B", help="suites and sections (see --list); default: all but quick")
    add(
        "--filter",
        default="",
        metavar="PATTERN",
        help="only cases that have all of these words in their suite, name or label",
    )
    add(
        "--peers",
        default="",
        metavar="A,B",
        help="compare only with providers whose name contains one of these words; none: only anyattn",
    )
    add(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of every provider (default: those of the CPU engine)",
    )
    add("--target", default="", metavar="NAME", help="instruction set of the CPU engine (`anyattn info` lists them)")
    add("--seconds", type=float, default=0.0, help=f"seconds per case (default: 1, quick: {QUICK_SECONDS})")
    add(
        "--tune",
        action="store_true",
        help="first tune the backends for the GPU of this machine (`anyattn tune`)",
    )
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="draw a PNG, or one PNG per plot in a folder (needs matplotlib)")
    add("--list", action="store_true", help="list suites, cases, sections and providers, and measure nothing")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; return 0, 1 if results of anyattn were wrong or refused, 2 for wrong arguments."""
    if find_spec("torch") is None:
        sys.stderr.write("anyattn bench needs torch: pip install torch\n")
        return 1
    if arguments.plot and find_spec("matplotlib") is None:
        sys.stderr.write("--plot needs matplotlib: pip install matplotlib\n")
        return 1
    with _environment(arguments):
        try:
            plan = _plan(arguments)
        except ValueError as error:
            sys.stderr.write(f"anyattn bench: {error}\n")
            return 2
        if arguments.list:
            _list(plan)
            return 0
        if arguments.tune and tune.run(argparse.Namespace(backend=None, seconds=tune.SECONDS, json=False)):
            return 1
        return _measure(plan, arguments)


def _measure(plan: Any, arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..bench import plots, report
    from ..bench.run import run as measure

    def keep(results: dict[str, Any]) -> None:
        if arguments.json:
            report.write(results, arguments.json)

    with _progress(plan.steps) as progress:
        results = measure(replace(plan, progress=progress, keep=keep))
    _print(results)
    if arguments.plot:
        for path in plots.plot(results, arguments.plot):
            print(f"wrote {path}")
    without_anyattn = [row for row in results["cases"] if report.OURS not in row["seconds"]]
    return 1 if without_anyattn else 0


def _plan(arguments: argparse.Namespace) -> Any:
    """Return the plan; raise ValueError if a suite, section, case or provider does not exist."""
    from ..bench.providers import choose
    from ..bench.run import SECTIONS, Plan
    from ..bench.suites import DEFAULT, SUITES, select

    threads = _apply(arguments.threads)
    named = [name.strip() for name in arguments.suite.split(",") if name.strip()]
    for name in named:
        if name not in SUITES and name not in SECTIONS:
            raise ValueError(f"--suite must be of {', '.join((*SUITES, *SECTIONS))}, got {name!r}.")
    suites = [name for name in named if name in SUITES] if named else ["quick"] if arguments.quick else list(DEFAULT)
    sections = [name for name in named if name in SECTIONS] if named else [] if arguments.filter else list(SECTIONS)
    workloads = select(suites, arguments.filter)
    if suites and not workloads:
        raise ValueError(f"--filter must match a case of {', '.join(suites)}, got {arguments.filter!r}. See --list.")
    if arguments.seconds < 0:
        raise ValueError(f"--seconds must be >= 0, got {arguments.seconds}.")
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else 1.0)
    providers = choose(arguments.peers.split(","))
    return Plan(workloads, tuple(sections), providers, threads, seconds, arguments.quick)


def _apply(threads: int) -> int:
    """Set the same number of threads for all providers; raise ValueError for an invalid number or instruction set."""
    import torch

    from ..backends.cpu import library

    if threads < 0 or threads > 4096:
        raise ValueError(f"--threads must be 1 to 4096 (0: those of the CPU engine), got {threads}.")
    if threads:
        torch.set_num_threads(threads)
    try:
        native = library.load()
        native.target_index()
        threads = threads or native.num_threads()
    except library.LibraryError as error:
        if settings.current().cpu_target:
            raise ValueError(str(error)) from error
        threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    return threads


@contextlib.contextmanager
def _environment(arguments: argparse.Namespace) -> Iterator[None]:
    """Set --threads and --target in this process and its child processes, and restore the old settings afterwards."""
    import torch

    torch_threads = torch.get_num_threads()
    names = settings.VARIABLES
    wanted = {names["cpu_target"][0]: arguments.target}
    if arguments.threads > 0:
        wanted |= {names["num_threads"][0]: str(arguments.threads), "OMP_NUM_THREADS": str(arguments.threads)}
    wanted = {name: value for name, value in wanted.items() if value}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    settings.reload()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        settings.reload()
        torch.set_num_threads(torch_threads)


def _list(plan: Any) -> None:
    rows = [(workload.suite, workload.name, workload.label) for workload in plan.workloads]
    print(table(("suite", "case", "(batch, nheads, seqlen, head_dim)"), rows, left=True))
    print(f"\nsections: {', '.join(plan.sections)}\nproviders:")
    for provider in plan.providers:
        print(f"  {provider.name}: {provider.absent() or 'installed'}")


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show progress: a bar on a terminal with rich, one overwritten line on a terminal without it, lines in a log."""
    if not sys.stderr.isatty():
        yield lambda text: (sys.stderr.write(f"{text}\n"), sys.stderr.flush(), None)[-1]
    elif find_spec("rich") is None:
        yield lambda text: (sys.stderr.write(f"\r{text[:78]:78}\r"), sys.stderr.flush(), None)[-1]
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=steps, completed=-1)
            yield lambda text: bar.update(task, description=text, advance=1)


def _print(results: dict[str, Any]) -> None:
    from ..bench.report import notes, tables

    rich = find_spec("rich") is not None and sys.stdout.isatty()
    for part in tables(results):
        if rich:
            _rich(part)
        else:
            print(f"{part.title}\n{table(part.header, part.rows)}\n")
    for line in notes(results):
        print(line)


def _rich(part: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="underline")
    for index, name in enumerate(part.header):
        shown.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in part.rows:
        shown.add_row(*row, style="bold" if row[0].strip() == "anyattn" else None)
    console = Console()
    console.print(f"\n{part.title}", style="bold", markup=False, highlight=False)
    console.print(shown)
