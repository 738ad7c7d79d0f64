"""Compare every model of the installed transformers and diffusers with eager attention.

    python tests/model_sweep/sweep.py [--table PAGE] [MODEL ...]

Each model runs in a process of its own, with limits of time and memory. Results are kept in a folder whose name depends
on this code, on the installed package and on what it is compared with: an interrupted sweep continues there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model_sweep import table
from model_sweep.verdicts import CRASH, WRONG, describe

CPU_SECONDS, SECONDS, GIBIBYTES = 120, 1200, 8


def main() -> int:
    """Run the sweep; return the exit status."""
    options = parse()
    prepare()
    names = wanted(options.models)
    folder = Path(options.results) / fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    left = [x for x in names if options.again or not result_path(folder, x).exists()]
    sys.stderr.write(f"{len(names)} models, {len(left)} to run; results in {folder}\n")
    run_all(left, folder, options.jobs)
    reports = [json.loads(result_path(folder, x).read_text()) for x in names]
    if options.table and not options.models:
        write_table(reports, Path(options.table))
    return summarize(reports)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="model types, with their variants; all by default")
    parser.add_argument("--results", default="build/models", help="where results are kept")
    parser.add_argument("--table", help="the page to write after a run of all models")
    parser.add_argument("--again", action="store_true", help="do not use results that exist")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def prepare() -> None:
    """Import what every process needs and keep it quiet; nothing may be computed before the processes fork."""
    import logging
    import warnings

    import torch
    import torch._dynamo
    import torch.export
    import transformers

    from model_sweep import diffusion, implementations, special, subject  # noqa: F401

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    implementations.register()


def wanted(types: list[str]) -> list[str]:
    """Return the names of the models to run: of these types, or all."""
    from model_sweep import classes, diffusion

    known = [x for x in classes.names() if not types or x in types]
    found = [subject.name for name in known for subject in classes.subjects(name)]
    return found + [f"{diffusion.PREFIX}{x}" for x in diffusion.classes() if not types or x in types]


def fingerprint() -> str:
    """Return a name for what results depend on: this code, the installed package, and the versions of what it uses."""
    import diffusers
    import torch
    import transformers

    import anyattn

    found = hashlib.sha256("".join(x.__version__ for x in (torch, transformers, diffusers)).encode())
    for folder in (Path(__file__).parent, Path(anyattn.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def result_path(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '_').replace(' ', '_')}.json"


def run_all(names: list[str], folder: Path, jobs: int) -> None:
    """Run one process per model, `jobs` at a time."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), dict[str, tuple[BaseProcess, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            process = fork.Process(target=child, args=(name, folder))
            process.start()
            running[name] = (process, time.monotonic())
        time.sleep(0.02)
        for name, (process, since) in list(running.items()):
            late = time.monotonic() - since > SECONDS
            if late:
                process.kill()
            if late or not process.is_alive():
                process.join()
                finish(name, folder, "takes too long" if late else f"ended with {process.exitcode}")
                del running[name]


def child(name: str, folder: Path) -> None:
    """Examine a model and write what is found."""
    from model_sweep import diffusion, subject

    sys.stdin.close()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    path = result_path(folder, name)
    partial = path.with_suffix(".partial")
    examine = diffusion.examine if name.startswith(diffusion.PREFIX) else subject.examine
    try:
        report = examine(name, lambda found: write(partial, found))
    except Exception as error:  # a fault of the sweep itself, which must not pass for a model that cannot be run
        report = {"name": name, "class": "", "calls": {}, "reason": "", "checks": {}}
        report["checks"]["examine"] = {"sweep": (CRASH, 0.0, describe(error))}
    write(path, report)
    partial.unlink(missing_ok=True)
    os._exit(0)


def write(path: Path, report: Any) -> None:
    whole = path.with_suffix(".writing")
    whole.write_text(json.dumps(report, indent=1))
    whole.replace(path)


def finish(name: str, folder: Path, reason: str) -> None:
    """Make a report from the output of a process that failed."""
    path = result_path(folder, name)
    partial = path.with_suffix(".partial")
    if path.exists():
        return
    report: Any = {"name": name, "class": "", "checks": {}, "calls": {}}
    if partial.exists():
        report = json.loads(partial.read_text())
        partial.unlink()
    check, _, way = report.pop("now", "building").removesuffix(")").rpartition(" (")
    if check:  # what ends a process while a check runs is worse than an exception
        report["checks"].setdefault(check, {})[way] = (CRASH, 0.0, reason)
    write(path, report | {"reason": f"{reason} in {check or way}"})


def write_table(reports: list[Any], path: Path) -> None:
    import diffusers
    import transformers

    versions = {"transformers": transformers.__version__, "diffusers": diffusers.__version__}
    path.write_text(table.page(reports, versions), encoding="utf-8")


def summarize(reports: list[Any]) -> int:
    """Print what cannot be run, the counts, and what is wrong; return 1 if something is."""
    counts: dict[str, Counter[str]] = {}
    bad = []
    for report in reports:
        for check, way, outcome, text in table.outcomes(report):
            counts.setdefault(f"{check} ({way})", Counter())[outcome] += 1
            if outcome in (WRONG, CRASH):
                bad.append(f"{report['name']} [{check}, {way}] {outcome}: {text}")
    unusable = [f"not run: {x['name']}: {x['reason']}" for x in reports if x.get("reason")]
    dull = [f"{x['name']}: {text}" for x in reports if (text := table.insensitive(x))]
    rows = [f"{check:24} {dict(row)}" for check, row in counts.items()]
    total = f"{len(reports)} models, {len(unusable)} not run, {len(bad)} checks failed"
    sys.stdout.write("\n".join([*unusable, *dull, *rows, *bad, total, ""]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
