"""Compare every model of the installed transformers with eager: `python tests/model_sweep/sweep.py`.

Each model runs in a process of its own, with limits of time and memory. An interrupted sweep continues where it stopped,
because results are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SECONDS, GIBIBYTES = 120, 8


def main() -> int:
    """Run the sweep; return the exit status."""
    options = parse()
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    from model_sweep import classes

    types = [x for x in classes.names() if not options.models or x in options.models]
    subjects = [subject for name in types for subject in classes.subjects(name)]
    left = [x for x in subjects if options.again or not result_path(folder, x.name).exists()]
    sys.stderr.write(f"{len(subjects)} models, {len(left)} to run\n")
    run_all(left, folder, options.jobs)
    reports = [json.loads(result_path(folder, x.name).read_text()) for x in subjects]
    return summarize(reports)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="model types; all by default")
    parser.add_argument("--results", default="build/models", help="where results are kept")
    parser.add_argument("--again", action="store_true", help="do not use results that exist")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def prepare() -> None:
    """Import what every process needs and keep it quiet; nothing may be computed before the processes fork."""
    import logging
    import warnings

    import torch
    import transformers

    from model_sweep import implementations

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    implementations.register()


def result_path(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '_').replace(' ', '_')}.json"


def run_all(subjects: list[Any], folder: Path, jobs: int) -> None:
    """Run one process per model, `jobs` at a time."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(subjects)), dict[Any, tuple[BaseProcess, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            subject = waiting.pop()
            process = fork.Process(target=child, args=(subject, folder))
            process.start()
            running[subject] = (process, time.monotonic())
        time.sleep(0.02)
        for subject, (process, since) in list(running.items()):
            late = time.monotonic() - since > SECONDS
            if late:
                process.kill()
            if late or not process.is_alive():
                process.join()
                finish(subject, folder, "takes too long" if late else f"ended with {process.exitcode}")
                del running[subject]


def child(subject: Any, folder: Path) -> None:
    """Examine a model and write what is found."""
    sys.stdin.close()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    from model_sweep.subject import examine

    path = result_path(folder, subject.name)
    partial = path.with_suffix(".partial")
    report = examine(subject, lambda found: write(partial, found))
    write(path, report)
    partial.unlink(missing_ok=True)
    os._exit(0)


def write(path: Path, report: Any) -> None:
    path.write_text(json.dumps(report, indent=1))


def finish(subject: Any, folder: Path, reason: str) -> None:
    """Turn what a process left behind that did not end well into a report."""
    path = result_path(folder, subject.name)
    partial = path.with_suffix(".partial")
    if path.exists():
        return
    report = json.loads(partial.read_text()) if partial.exists() else {"name": subject.name, "class": "", "checks": {}}
    partial.unlink(missing_ok=True)
    write(path, report | {"reason": f"{reason} in {report.pop('now', 'building')}"})


def summarize(reports: list[Any]) -> int:
    """Print what is wrong and the counts; return 1 if something is."""
    counts: dict[str, dict[str, int]] = {}
    bad = []
    for report in reports:
        for check, ways in report["checks"].items():
            for way, (outcome, _, text) in ways.items():
                row = counts.setdefault(f"{check} ({way})", {})
                row[outcome] = row.get(outcome, 0) + 1
                if outcome in ("wrong", "crash"):
                    bad.append(f"{report['name']} [{check}, {way}] {outcome}: {text}")
    sys.stdout.write("\n".join([*bad, ""]))
    for check, row in counts.items():
        sys.stdout.write(f"{check:24} {row}\n")
    unusable = [f"{x['name']}: {x['reason']}" for x in reports if x.get("reason")]
    sys.stdout.write(f"{len(reports)} models, {len(unusable)} cannot be run\n" + "\n".join(unusable) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
