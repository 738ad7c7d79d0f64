"""Threads of two libraries in one process: attention directly after a torch operation, and the reverse."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .timing import summary

SIZE = 512


def measure(seconds: float = 3.0) -> dict[str, Any]:
    """Return the seconds of attention at (1, 8, 512, 64) and of torch.mm(512), each alone and alternating."""
    import torch

    from .. import attention

    q, k, v = (torch.randn(1, SIZE, 8, 64) for _ in range(3))
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    ours, theirs = (lambda: attention(q, k, v)), (lambda: torch.mm(a, b))
    samples: dict[str, list[float]] = {name: [] for name in ("attention", "attention after", "mm", "mm after")}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples["mm"]) < 32:
        samples["attention"] += _timed(ours, ours)[0]
        samples["mm"] += _timed(theirs, theirs)[0]
        attention_after, mm_after = _timed(ours, theirs)
        samples["attention after"] += attention_after
        samples["mm after"] += mm_after
    return {name: asdict(summary(times)) for name, times in samples.items()}


def _timed(first: Callable[[], Any], second: Callable[[], Any], calls: int = 8) -> tuple[list[float], list[float]]:
    """Time two functions alternately. The first pair is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls + 1):
        for function, samples in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            samples.append(time.perf_counter() - start)
    return times[0][1:], times[1][1:]
