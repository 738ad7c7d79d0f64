"""Run of the benchmark: the correctness gate, alternating timing, then measurements other than workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from . import ceilings, derivatives, gate, interleaving, memory, overhead, precision, report, score_functions
from .inputs import Inputs
from .providers import Prepared, Provider, Refused
from .timing import measure
from .workloads import Workload

Row = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Measurements to make.

    seconds: per workload. quick: sections measure less. keep: called with the results after each step, so that an
    interrupted run keeps its results.
    """

    workloads: list[Workload]
    sections: tuple[str, ...]
    providers: tuple[Provider, ...]
    threads: int
    seconds: float = 1.0
    quick: bool = False
    progress: Progress = field(default=lambda text: None)
    keep: Callable[[dict[str, Any]], None] = field(default=lambda results: None)

    @property
    def steps(self) -> int:
        """Return how often `progress` is called."""
        return len(self.workloads) + len(self.sections)


# Sections in addition to the suites of workloads. Each gets the plan and the available providers.
SECTIONS: dict[str, Callable[[Plan, tuple[Provider, ...]], Any]] = {
    "features": lambda plan, present: overhead.features(plan.seconds * (1 if plan.quick else 4)),
    "small_calls": lambda plan, present: overhead.small_calls(plan.seconds),
    "first_call": lambda plan, present: overhead.first_call(1 if plan.quick else 3),
    "citizen": lambda plan, present: interleaving.measure(plan.seconds),
    "memory": lambda plan, present: memory.measure(present, plan.threads, plan.quick),
    "derivatives": lambda plan, present: derivatives.measure(plan.threads, plan.seconds, plan.quick),
    "score_functions": lambda plan, present: score_functions.measure(plan.seconds, plan.quick),
    "accuracy": lambda plan, present: precision.summary(plan.threads, plan.quick),
}


def run(plan: Plan) -> dict[str, Any]:
    """Return all measurements, ready for JSON."""
    absent = {p.name: reason for p in plan.providers if (reason := p.absent())}
    present = tuple(p for p in plan.providers if p.name not in absent)
    results: dict[str, Any] = {"machine": report.header(plan.threads, plan.providers), "absent": absent, "cases": []}
    stream = ceilings.Stream()
    for workload in plan.workloads:
        plan.progress(f"{workload.name}: {workload.label}")
        results["cases"].append(run_workload(workload, present, plan.threads, plan.seconds, stream))
        _level(results["cases"])
        plan.keep(results)
    for name in plan.sections:
        plan.progress(name)
        results[name] = SECTIONS[name](plan, present)
        plan.keep(results)
    return results


def _level(rows: list[Row]) -> None:
    """Use the best peak of the run for each dtype, because the peak is one number and noise only lowers it."""
    for dtype in {row["dtype"] for row in rows}:
        selected = [row for row in rows if row["dtype"] == dtype]
        peak = ceilings.best(*(row["peak_flops"] for row in selected))
        for row in selected:
            row["peak_flops"] = peak


def run_workload(
    workload: Workload,
    providers: Iterable[Provider],
    threads: int,
    seconds: float,
    stream: ceilings.Stream | None = None,
) -> Row:
    """Return one row: seconds of every provider with right results, and why the others were not timed."""
    inputs = Inputs(workload)
    expected = gate.Gate(inputs)
    functions: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for provider in providers:
        try:
            prepared = prepare(provider, inputs, threads)
            problem = None if prepared is None else check(expected, prepared)
        except Refused as reason:
            refused[provider.name] = str(reason)
            continue
        except Exception as error:  # a failure of one library must not end the run
            refused[provider.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if problem:
            wrong[provider.name] = problem
        elif prepared is not None:
            functions[provider.name] = prepared.run
    before = _ceilings(workload, stream)
    timings = measure(functions, seconds) if functions else {}
    after = _ceilings(workload, stream)
    row = asdict(workload) | {
        "label": workload.label,
        "flops": workload.flops,
        "bytes": workload.bytes,
        "kv_bytes": workload.kv_bytes,
    }
    row |= {name: ceilings.best(before[name], after[name]) for name in before}
    row |= {"refused": refused, "wrong": wrong}
    return row | {"seconds": {name: asdict(timing) for name, timing in timings.items()}}


def prepare(provider: Provider, inputs: Inputs, threads: int) -> Prepared | None:
    """Return the provider's call. Only anyattn has quantised caches, so other providers refuse them."""
    if inputs.workload.stored and provider.package != "anyattn":
        raise Refused("no quantised cache")
    return provider.prepare(inputs, threads)


def check(expected: gate.Gate, prepared: Prepared) -> str | None:
    """Return why this provider's result must not be timed, or None."""
    return expected.wrong(prepared.results(prepared.run()), prepared.own_dropout)


def _ceilings(workload: Workload, stream: ceilings.Stream | None) -> dict[str, float | None]:
    read = stream.read() if stream is not None and workload.reads_memory else None
    return {"peak_flops": ceilings.flops(workload.dtype), "stream_bytes": read}
