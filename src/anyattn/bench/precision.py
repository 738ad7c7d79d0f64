"""Largest error compared with float64 at (1, 8, 512, 64), unit normal, on the same inputs for every provider."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from . import gate
from .inputs import Inputs
from .providers import by_name
from .workloads import Workload

CASE = Workload("accuracy", 1, 8, 512, 64)
SEEDS = 10
NAMES = ("anyattn", "torch SDPA", "softmax(QK^T)V")
DTYPES = ("float32", "float16", "bfloat16")


def errors(workload: Workload, seeds: int, threads: int) -> dict[str, list[float]]:
    """Return provider -> largest absolute error per seed, on inputs rounded to the workload's dtype."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for seed in range(seeds):
        inputs = Inputs(workload, seed)
        expected = gate.Gate(inputs)
        for name in NAMES:
            prepared = by_name(name).prepare(inputs, threads)
            assert prepared is not None
            out = prepared.results(prepared.run())[0]
            found[name].append(expected.errors([out])["out"])
    return found


def summary(threads: int, quick: bool = False) -> list[dict[str, Any]]:
    """Return one row per dtype: for every provider, the median over seeds of the largest error."""
    rows = []
    for dtype in DTYPES:
        values = errors(replace(CASE, dtype=dtype), 2 if quick else SEEDS, threads)
        rows.append({"dtype": dtype, "errors": {name: median(x) for name, x in values.items()}})
    return rows
