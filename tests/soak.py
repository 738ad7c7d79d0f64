"""Random problems for as long as you like: every feature, sizes to 4,096, instruction sets in turn, both directions.

Each problem follows from its seed alone. It is checked against float64 within the budget of accuracy.py, must give the
same bits on one thread and on two, may write nothing but its results, and memory must not grow. Every fourth problem
appends to a KV cache and attends to it. Half of all have every array laid out at random.

    python tests/soak.py --seconds 3600           (make soak SECONDS=3600)
    python tests/soak.py --problems 150           so many of them
    python tests/soak.py --only 1234              one problem, on every instruction set
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import os
import random
import sys
import time
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np

from anyattn import testing
from anyattn.definition import accuracy, reference
from anyattn.frameworks.numpy import NumpyAdapter
from anyattn.testing import Case, CaseInputs, make_inputs
from anyattn.testing.cases import DTYPES, random_side
from harness.backends import Engine, cpu_targets
from harness.checks import bits, refused, run
from harness.kvcache_cases import AppendCase
from harness.kvcache_cases import problems_of as cache_problems_of
from harness.memory import Memory, guarded_empty

# One problem in 50 is a single head with as many rows and keys as it drew.
LIMITS = testing.Limits(smallest=0, shortest=0, longest=4096, head_dim=260, scores=2**20, single_head_in=50)
# Memory that may remain: scratch memory of a thread (8 MiB), plans, and holes in the heap.
GROWTH_MIB = 24
WARM_UP = 200  # problems
LEAST = 1e-300


def draw(seed: int) -> Case:
    """Draw any call that is allowed, with bounded work."""
    return testing.random_case(random.Random(seed), LIMITS, f"seed{seed}")


def draw_cache(seed: int) -> AppendCase:
    """Draw any call of the KV cache that is allowed, with bounded work."""
    rng = random.Random(seed)
    batch, kv, group = rng.choice((0, 1, 2, 5)), rng.choice((1, 2, 3)), rng.choice((1, 2, 4))
    slots, width = int(2 ** rng.uniform(0, 10)), rng.choice((rng.randint(2, 40), 64, 80, 128))
    paged, rotary = rng.random() < 0.4, rng.random() < 0.6
    return AppendCase(
        dtype=rng.choice(DTYPES),
        batch=batch,
        slots=slots,
        new=rng.randint(0, min(slots, rng.choice((1, 8, 60)))),
        rows=rng.choice((0, 1, 1, 4, rng.randint(1, 70))),
        nheads_kv=kv,
        group=group,
        head_dim=width,
        head_dim_v=rng.choice((width, rng.randint(1, 70))),
        page_size=rng.choice((1, 16, rng.randint(1, 300))) if paged else 0,
        entries=not paged and rng.random() < 0.5,
        rotary_dim=2 * rng.randint(1, width // 2) if rotary else 0,
        interleaved=rng.random() < 0.5,
        causal=rng.random() < 0.5,
        window=rng.choice((None, None, (random_side(rng, LIMITS.longest), random_side(rng, LIMITS.longest)))),
        leftpad=rng.random() < 0.3,
        rows_used=rng.random() < 0.3,
        scattered=rng.random() < 0.8,
        seed=rng.getrandbits(32),
    )


def drawn(seed: int) -> Case | AppendCase:
    """The problem of a seed."""
    return draw_cache(seed) if seed % 4 == 3 else draw(seed)


def problems_of(case: Case | AppendCase, target: str, memory: Memory) -> list[str]:
    """[] or a line for everything that is wrong."""
    wrong = _attention(case, target) if isinstance(case, Case) else _cache(case, target)
    try:
        memory.check()
    except AssertionError as error:
        wrong.append(str(error))
    return wrong


def _cache(setup: AppendCase, target: str) -> list[str]:
    wrong = []
    for threads in (1, 2):
        Engine("cpu", target).use(threads)
        wrong += [f"{threads} threads: {line}" for line in cache_problems_of(setup, "cpu")]
    return wrong


def _attention(case: Case, target: str) -> list[str]:
    inputs = make_inputs(case)
    inputs.arguments["batch_invariant"] = case.seed % 5 == 0
    before = inputs.bytes()
    wrong = []
    for direction in testing.PASSES:
        engine = Engine("cpu", target)
        engine.use(1)
        if refused(inputs, direction, engine):
            continue
        got = run(inputs, direction, engine)
        want = {name: replace(x, value=flushed(x.value)) for name, x in testing.expected(inputs, direction).items()}
        lines = testing.compare(want, got)
        if lines and case.dtype == "float64":
            lines = testing.compare(widened(want, inputs, direction), {name: flushed(x) for name, x in got.items()})
        wrong += [f"{direction}: {line}" for line in lines]
        wrong += [f"{direction}: {name} differs on two threads" for name in different(inputs, direction, target, got)]
    if inputs.bytes() != before:
        wrong.append("an input, or memory around it, was written")
    return wrong


def widened(want: dict[str, accuracy.Expected], inputs: CaseInputs, direction: str) -> dict[str, accuracy.Expected]:
    """Budgets that count what the float64 reference itself is wrong by: scores of hundreds multiply its rounding.

    It is seen where the dot products are summed in another order.
    """
    problem, arrays = inputs.describe()
    turned = arrays | {name: arrays[name][..., ::-1] for name in ("q", "k")}
    if direction == "forward":
        values = dict(zip(("out", "lse"), reference.forward(problem, turned), strict=True))
    else:
        values = vars(reference.backward(problem, turned, inputs.dout64, inputs.dlse64))
        for name in ("dq", "dk"):
            values[name] = values[name][..., ::-1]
    wider = {}
    for name, x in want.items():
        error = x.error(flushed(values[name]))
        assert np.isfinite(error), f"the reference disagrees with itself about {name}"
        wider[name] = replace(x, budget=x.budget + 2 * error)
    return wider


def flushed(x: Any) -> Any:
    """Products near the least float64 are 0 or not as they were rounded: 0 stands for all of them."""
    return x if x is None else np.where(np.abs(x) < LEAST, 0.0, x)


def different(inputs: CaseInputs, direction: str, target: str, got: dict[str, Any]) -> list[str]:
    engine = Engine("cpu", target)
    engine.use(2)
    again = run(inputs, direction, engine)
    return [name for name, x in got.items() if x is not None and not np.array_equal(bits(x), bits(again[name]))]


def resident_mib() -> float:
    """Return the resident memory in MiB after free memory was released, or 0 if it is unknown."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0.0
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    pages = int(status.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Run:
    """A run so far."""

    first: int
    seconds: float
    problems: float
    current: Synchronized[int]
    memory: Memory = field(default_factory=Memory)
    failed: int = 0
    warm_mib: float = 0.0

    def loop(self) -> None:
        targets, start, told = cpu_targets(), time.monotonic(), 0.0
        count = 0
        while (now := time.monotonic() - start) < self.seconds and count < self.problems:
            seed = self.first + count
            self.current.value = seed
            self.one(seed, targets[count % len(targets)])
            count += 1
            if count == WARM_UP:
                self.warm_mib = resident_mib()
            if now - told > 30:
                told = now
                say(f"{now:.0f} s: seeds to {seed}, {self.failed} failed, {resident_mib():.0f} MiB")
        self.judge(count)

    def one(self, seed: int, target: str) -> None:
        case = drawn(seed)
        try:
            wrong = problems_of(case, target, self.memory)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            self.failed += 1
            say(f"FAILED on {target}: {case!r}", *wrong, f"alone: python tests/soak.py --only {seed}")

    def judge(self, count: int) -> None:
        growth = resident_mib() - self.warm_mib if self.warm_mib else 0.0
        say(f"{count} problems, {self.failed} failed; memory grew by {growth:.1f} MiB after the first {WARM_UP}")
        sys.exit(1 if self.failed or growth > GROWTH_MIB else 0)


def guarded(state: Run) -> Run:
    """Allocate results and workspaces of NumPy from the memory of this run."""
    NumpyAdapter.empty = guarded_empty(state.memory)  # type: ignore[method-assign]
    return state


def say(*lines: str) -> None:
    sys.stdout.write("\n  ".join(lines) + "\n")
    sys.stdout.flush()


def work(first: int, seconds: float, problems: float, current: Synchronized[int]) -> None:
    guarded(Run(first, seconds, problems, current)).loop()


def only(seed: int) -> int:
    state = guarded(Run(seed, 0, 1, multiprocessing.Value("q", seed)))
    for target in cpu_targets():
        state.one(seed, target)
    say(f"{drawn(seed)!r}: {state.failed} of {len(cpu_targets())} instruction sets failed")
    return 1 if state.failed else 0


def main() -> int:
    """Run the problems in a child process, so that a crash is reported with its seed."""
    parser = argparse.ArgumentParser(description="random problems against float64")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--problems", type=int, help="stop after so many; without --seconds, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--only", type=int, metavar="SEED", help="this problem alone")
    arguments = parser.parse_args()
    if arguments.only is not None:
        return only(arguments.only)
    seconds, problems = arguments.seconds, arguments.problems or math.inf
    if seconds is None:
        seconds = math.inf if arguments.problems else 60
    context = multiprocessing.get_context("spawn")
    current = context.Value("q", arguments.seed)
    process = context.Process(target=work, args=(arguments.seed, seconds, problems, current))
    process.start()
    process.join()
    if process.exitcode not in (0, 1):
        say(f"CRASHED with status {process.exitcode}: python tests/soak.py --only {current.value}")
    return 0 if process.exitcode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
