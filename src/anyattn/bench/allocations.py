"""Bytes that PyTorch allocates on the CPU during a piece of work, as its profiler records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Allocated(NamedTuple):
    """Bytes of live tensors: at their peak, and at the end of the work while its result is kept."""

    peak: int
    kept: int


def allocated_bytes(work: Callable[[], object]) -> Allocated:
    """Return the bytes that a piece of work allocates.

    Tensors that exist before the work do not count, and releasing them counts as negative. Temporary tensors of
    operators and workspaces count.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    live = peak = 0
    for _, size in sorted(_allocations(record)):
        live += size
        peak = max(peak, live)
    del result
    return Allocated(peak, live)


def _allocations(record: Any) -> list[tuple[int, int]]:
    """Return the time and the size of every allocation; the size of a release is negative."""
    found = []
    events = list(record.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return found
