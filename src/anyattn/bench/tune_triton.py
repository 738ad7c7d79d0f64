"""Tuning of the Triton kernels: the fastest tiles on this card, found by hill climbing from the active tiles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from .. import explicit, testing
from ..backends.triton import tuning
from ..backends.triton.device import device as card
from ..backends.triton.tuning import CHOICES, Tiles
from ..definition.accuracy import Expected
from ..definition.errors import CompilationError
from ..runtime import dispatch

FASTER = 0.97  # a tile must take less than this share of the time, because smaller differences are noise
ROUNDS = 5
GROUP = 4  # query heads per KV head


class Workload(NamedTuple):
    """Problem on which the tiles of a phase are measured: causal, GROUP query heads per KV head."""

    phase: str
    dtype: str
    head_dim: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads_kv: int = 4


class Task(NamedTuple):
    """Timed call, and its expected results for the last KV head of the last sequence."""

    call: Callable[[], tuple[Any, ...]]
    expected: dict[str, Expected]

    def is_right(self, results: tuple[Any, ...]) -> bool:
        """Return whether results are within their error budgets."""
        got = {name: testing.to_numpy(_last(name, x)) for name, x in zip(self.expected, results, strict=False)}
        return not testing.compare(self.expected, got)


class Result(NamedTuple):
    """Tiles and seconds before tuning, and the fastest ones."""

    workload: Workload
    before: Tiles
    seconds_before: float
    tiles: Tiles
    seconds: float


def workloads(device: str) -> list[Workload]:
    """Return the workloads by phase, dtype and head size. Both 16-bit dtypes share their tiles."""
    half = "float16" if card(device).arch in ("sm_70", "sm_75") else "bfloat16"
    kinds = [(half, 64), (half, 128), (half, 256), ("float32", 64), ("float32", 128)]
    return [
        Workload(phase, dtype, head_dim, *((16, 1, 8192) if phase == "decode" else (2, 4096, 4096)))
        for phase in tuning.PHASES
        for dtype, head_dim in kinds
    ]


def tune(workload: Workload, device: str, seconds: float, clock: Callable[..., float] | None = None) -> Result:
    """Measure the fastest tiles and activate them. Tiles that do not compile or compute wrongly are not timed."""
    measure = clock or partial(time_call, device=device, seconds=seconds)
    arch = card(device).arch
    task, before = make_task(workload, device), tiles_in_use(workload, arch)
    key = (arch, workload.phase, workload.dtype, workload.head_dim)

    def timed(tiles: Tiles) -> float:
        tuning.use_tiles(*key, tiles)
        dispatch.forget()
        try:
            results = task.call()
        except CompilationError:
            return math.inf
        return measure(task.call) if task.is_right(results) else math.inf

    first = timed(before)
    tiles, fastest = climb(before, first, timed)
    tuning.use_tiles(*key, tiles)
    dispatch.forget()
    return Result(workload, before, first, tiles, fastest)


def climb(start: Tiles, seconds: float, timed: Callable[[Tiles], float]) -> tuple[Tiles, float]:
    """Return the end of a walk from neighbour to neighbour, continued while one is faster, and its seconds."""
    known = {start: seconds}
    here, improved = start, True
    while improved:
        improved = False
        for tiles in neighbours(here):
            if tiles not in known:
                known[tiles] = timed(tiles)
                if known[tiles] < FASTER * known[here]:
                    here, improved = tiles, True
                    break
    return here, known[here]


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """Yield tiles that differ in one field by one step."""
    for at, choices in enumerate(CHOICES):
        place = choices.index(tiles[at])
        for other in choices[max(place - 1, 0) : place + 2]:
            if other != tiles[at]:
                yield (*tiles[:at], other, *tiles[at + 1 :])


def tiles_in_use(workload: Workload, arch: str) -> Tiles:
    """Return the active tiles: tuned, or from the table."""
    dtype, width = workload.dtype, workload.head_dim
    if workload.phase == "forward":
        return tuning.forward(arch, dtype, width)
    if workload.phase == "decode":
        return tuning.decode(arch, dtype, width, tuning.DECODE_ROWS)
    return tuning.backward(arch, dtype, width)[workload.phase == "dq"]


def label(workload: Workload) -> str:
    """Return a workload as text."""
    return f"{workload.phase} {workload.dtype} {workload.head_dim}"


def make_task(workload: Workload, device: str) -> Task:
    """Return a call of the phase's pass on unit normal arrays, and its expected results."""
    import torch

    draw = partial(torch.randn, device=device, dtype=getattr(torch, workload.dtype))
    nheads, size = GROUP * workload.nheads_kv, workload.head_dim
    q = draw(workload.batch, workload.seqlen_q, nheads, size)
    k, v = (draw(workload.batch, workload.seqlen_k, workload.nheads_kv, size) for _ in range(2))
    last = {"q": _last("q", q), "k": _last("k", k), "v": _last("v", v), "causal": True}
    forward = partial(explicit.attention_forward, q, k, v, causal=True, backend="triton")
    if workload.phase in ("forward", "decode"):
        return Task(forward, testing.expected_results(last, random=True))
    (out, lse), dout = forward(), draw(q.shape)
    backward = partial(explicit.attention_backward, dout, q, k, v, out, lse, causal=True, backend="triton")
    return Task(backward, testing.expected_results(last, _last("dout", dout), random=True))


def _last(name: str, array: Any) -> Any:
    """Return the part of an array that belongs to the last KV head of the last sequence."""
    if name == "lse":  # (batch, nheads, seqlen_q)
        return array[-1:, -GROUP:]
    heads = 1 if name in ("k", "v", "dk", "dv") else GROUP
    return array[-1:, :, -heads:]


def time_call(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Return the median time of a call over rounds that together take about `seconds`, on an idle device."""
    once = _timed(call, 1, device)
    count = max(1, int(seconds / ROUNDS / max(once, 1e-6)))
    return median(_timed(call, count, device) for _ in range(ROUNDS))


def _timed(call: Callable[[], Any], count: int, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def _synchronize(device: str) -> None:
    kind = device.partition(":")[0]
    if kind != "cpu":  # the interpreter's
        import torch

        getattr(torch, kind).synchronize(device)
