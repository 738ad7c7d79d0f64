"""Timing in turns: A B C A B C ..., so that a noisy machine is noisy for all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

PAUSE = 0.004  # other runtimes' threads spin for a while after their turn
WARM = 0.02  # a call that is shorter than this runs once untimed at the beginning of its turn
CALLS = 32  # in one turn
SLOW = 0.2


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: median, and the quartiles that say how far to trust it."""

    median: float
    low: float
    high: float
    rounds: int


def measure(functions: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 5) -> dict[str, Timing]:
    """Times each function in turn for about `seconds` in all and at least `rounds` turns each (2, where a call is
    longer than `seconds`).

    A short one runs several times in its turn, so that a slow neighbour does not leave it with a handful of samples.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    once = {name: _once(function) for name, function in functions.items()}
    share = seconds / rounds / max(1, len(functions))
    calls = {name: max(1, min(CALLS, int(share / max(least, 1e-9)))) for name, least in once.items()}
    least_rounds = rounds if sum(once.values()) < seconds else min(rounds, 3)
    end, turn = time.perf_counter() + seconds, 0
    while turn < least_rounds or time.perf_counter() < end:
        for name, function in functions.items():
            if turn >= 2 and once[name] > seconds:
                continue
            time.sleep(PAUSE)
            if once[name] < WARM:
                function()
            samples[name].extend(_time(function) for _ in range(calls[name]))
        turn += 1
    return {name: summary(times) for name, times in samples.items()}


def _once(function: Callable[[], Any]) -> float:
    """What a call takes; the gate has already called it."""
    first = _time(function)
    return first if first > SLOW else min(first, _time(function))


def _time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summary(times: list[float]) -> Timing:
    low, _, high = quantiles(times, n=4)
    return Timing(median(times), low, high, len(times))
