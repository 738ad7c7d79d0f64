"""Timing in turns: every provider runs once in each round, so that a noisy machine is noisy for all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: median, and the quartiles that say how far to trust it."""

    median: float
    low: float
    high: float
    rounds: int


def measure(functions: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 5) -> dict[str, Timing]:
    """Times each function in turn, A B C A B C ..., for about `seconds` in all and at least `rounds` rounds."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return {name: _summary(times) for name, times in samples.items()}


def _summary(times: list[float]) -> Timing:
    low, _, high = quantiles(times, n=4)
    return Timing(median(times), low, high, len(times))
