"""Timing in turns, A B C A B C ..., so that noise of the machine affects all functions alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

PAUSE = 0.004  # seconds between two looks at what the threads of this process do
QUIET = 0.2  # seconds; other runtimes' threads spin for a while after their turn (OpenBLAS's for about 20 ms)
WARM = 0.02  # seconds; a shorter call runs once untimed at the start of its turn
CALLS = 32  # calls in one turn, at most
SLOW = 0.2


@dataclass(frozen=True, slots=True)
class Timing:
    """Median of the seconds, and the quartiles as a measure of the spread."""

    median: float
    low: float
    high: float
    rounds: int


def measure(functions: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 5) -> dict[str, Timing]:
    """Time each function in turn for about `seconds` in total and at least `rounds` turns each.

    A call longer than `seconds` has 2 turns. A short function runs several times in its turn, so that it gets enough
    samples next to a slow one.
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
            _wait_until_quiet()
            if once[name] < WARM:
                function()
            samples[name].extend(_time(function) for _ in range(calls[name]))
        turn += 1
    return {name: summary(times) for name, times in samples.items()}


def _wait_until_quiet() -> None:
    """Wait until the threads of this process use less than a tenth of a processor, at most QUIET seconds."""
    end = time.perf_counter() + QUIET
    used = PAUSE
    while used > PAUSE / 10 and time.perf_counter() < end:
        before = time.process_time()
        time.sleep(PAUSE)
        used = time.process_time() - before


def _once(function: Callable[[], Any]) -> float:
    """Return the time of a call. The gate has already called the function once."""
    first = _time(function)
    return first if first > SLOW else min(first, _time(function))


def _time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summary(times: list[float]) -> Timing:
    low, _, high = quantiles(times, n=4)
    return Timing(median(times), low, high, len(times))
