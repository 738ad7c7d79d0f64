"""Runs the benchmark: correctness gate first, then timing in turns, then memory; returns what the report writes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..backends.cpu import library
from ..backends.cpu.backend import DTYPES
from . import memory, precision, report
from .cases import Case, lengths, quick
from .providers import Run, correct, providers
from .timing import measure


def run(pattern: str = "", seconds: float = 1.0, whole: bool = True) -> dict[str, Any]:
    """Every case whose label contains `pattern`, about `seconds` each; `whole`: accuracy and memory too."""
    cases = [case for case in (*quick(), *lengths()) if pattern in f"{case.name} {case.label}"]
    rows = []
    for number, case in enumerate(cases, 1):
        report.progress(f"[{number}/{len(cases)}] {case.label}")
        rows.append(run_case(case, seconds))
    measured: dict[str, Any] = {}
    if whole:
        for provider in providers():
            report.progress(f"memory of {provider.name}")
            measured[provider.name] = {str(n): memory.peak(provider.name, n) for n in memory.LENGTHS}
    report.progress("\n")
    accuracy = precision.summary() if whole else []
    return {"machine": report.header(), "cases": rows, "memory": measured, "accuracy": accuracy}


def ceiling(dtype: str) -> float:
    """What registers alone would allow in this dtype, now; float16 is computed in float32."""
    native = library.load()
    return native.peak_flops(DTYPES["float32" if dtype == "float16" else dtype])


def run_case(case: Case, seconds: float) -> dict[str, Any]:
    """One row: seconds of every provider that is right, and why the others were not timed."""
    functions: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for provider in providers():
        function = provider.prepare(case)
        wrong = correct(case, function())
        if wrong:
            refused[provider.name] = wrong
        else:
            functions[provider.name] = function
    peak = ceiling(case.dtype)
    timings = measure(functions, seconds) if functions else {}
    peak = max(peak, ceiling(case.dtype))
    row = asdict(case) | {"label": case.label, "flops": case.flops, "refused": refused, "peak_flops": peak}
    return row | {"seconds": {name: asdict(timing) for name, timing in timings.items()}}
