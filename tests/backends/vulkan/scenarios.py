"""Interruptions of a Vulkan call. Each function runs in a separate process, `python scenarios.py NAME`.

Results are compared with the CPU backend's after each interruption. The last line of output says how much was tried.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import anyattn
from anyattn.backends.vulkan import engine as engines
from anyattn.backends.vulkan import memory as memories
from anyattn.backends.vulkan.api import VulkanError
from anyattn.backends.vulkan.commands import Commands
from anyattn.runtime import dispatch
from anyattn.vulkan import DeviceArray, release_memory

FOLDER = str(Path(engines.__file__).parent)
BOUND = 30  # seconds that a forked child may take
DRAW = np.random.default_rng(0).standard_normal
SMALL, LARGE = (DRAW((1, n, 4, 32), np.float32) for n in (24, 320))
WANT = anyattn.attention(SMALL, SMALL, SMALL, causal=True, backend="cpu")
LIVES = 3  # allocations that an exception in the middle of their making may cost
POINTS = 150
INTERRUPTS, CALLS = 40, 400


def attend(x: np.ndarray = SMALL) -> np.ndarray:
    return anyattn.attention(x, x, x, causal=True, backend="vulkan")


class Watch:
    """A check of the device: results, arrays stored there, and the number of allocations."""

    def __init__(self) -> None:
        attend()
        self.engine = engines.current_engine()
        self.kept = [DeviceArray(DRAW((1, 40, 2, 16), np.float32)) for _ in range(3)]
        self.values = [array.numpy() for array in self.kept]
        self.alive = 0
        create, destroy = self.engine.memory._new, self.engine.memory._destroy

        def counted(*arguments: Any) -> memories.Allocation:
            made = create(*arguments)
            self.alive += 1
            return made

        def uncounted(allocation: memories.Allocation) -> None:
            self.alive -= 1
            destroy(allocation)

        release_memory()
        self.engine.memory._new, self.engine.memory._destroy = counted, uncounted  # type: ignore[method-assign]

    def check(self) -> None:
        """Compute twice: the second call uses what the first has given back."""
        for _ in range(2):
            assert np.allclose(attend(), WANT, atol=1e-5)
        assert engines.current_engine() is self.engine, self.engine.device.lost

    def finish(self) -> None:
        self.check()
        assert all(np.array_equal(array.numpy(), x) for array, x in zip(self.kept, self.values, strict=True))
        gc.collect()
        release_memory()
        assert abs(self.alive) <= LIVES, f"{self.alive} allocations are neither in use nor kept"


def interrupted_at_random() -> str:
    """Ctrl+C at random moments of a call, and half of the times again while the first is handled."""
    watch, rng, raised, took = Watch(), random.Random(0), 0, 1.0
    attend(LARGE)

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal left, raised
        if left:
            left, raised = left - 1, raised + 1
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, press)
    for _ in range(CALLS):
        left = rng.choice((1, 2))
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, max(rng.uniform(0, took), 1e-6), 1e-3)
                start = time.perf_counter()
                attend(LARGE)
                took = min(took, time.perf_counter() - start)
            except KeyboardInterrupt:
                time.sleep(0.002)
        except KeyboardInterrupt:
            pass
        left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.check()
        if raised >= INTERRUPTS:
            break
    watch.finish()
    assert raised >= INTERRUPTS, raised
    return f"{raised} interrupts"


def interrupted_at_every_line() -> str:
    """An exception at every line of what guards a call, and at some lines of all the rest."""
    x = LARGE[:, :100]
    watch, names = Watch(), ("run_alone", "run_job", "settled", "work_when_idle", "take", "reclaim", "finish")
    guards = {*names, "settle", "_begin_anew", "_start", "_wait_for", "buffer", "_allocate"}
    lines: list[str] = []
    attend(x)
    traced(lambda: attend(x), lines.append)
    step = max(len(lines) // POINTS, 1)
    points = [i for i, name in enumerate(lines) if name in guards or i % step == 0]
    chosen = points if len(points) <= 2 * POINTS else sorted(random.Random(0).sample(points, 2 * POINTS))
    for point in chosen:
        raise_at(point, lambda: attend(x))
        watch.check()
    watch.finish()
    return f"{len(chosen)} of {len(lines)} lines"


def interrupted_again() -> str:
    """A second exception at every line of the wait for what the first has left running."""
    watch, wait = Watch(), Commands._wait_for
    waiting: list[bool] = []

    def refuse(self: Commands, fence: Any) -> None:
        if waiting:
            waiting.pop()
            raise KeyboardInterrupt  # the device is at work
        wait(self, fence)

    for point in range(100):
        waiting.append(True)
        Commands._wait_for = refuse  # type: ignore[method-assign]
        passed = raise_at(point, lambda: attend(LARGE), ("settle", "_begin_anew", "_new_fence"), lambda: not waiting)
        Commands._wait_for = wait  # type: ignore[method-assign]
        watch.check()
        if passed:
            watch.finish()
            return f"{point} lines"
    raise AssertionError("no end of lines")


def traced(call: Callable[[], Any], note: Callable[[str], Any]) -> None:
    """Call `note` with the function's name before each line of the backend."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            note(frame.f_code.co_name)
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)


def raise_at(
    point: int,
    call: Callable[[], Any],
    functions: tuple[str, ...] = (),
    armed: Callable[[], bool] = lambda: True,
) -> bool:
    """Raise before a line of the backend, or of these functions of it; return whether there are fewer lines."""
    left = [point]

    def note(name: str) -> None:
        if armed() and (not functions or name in functions):
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        traced(call, note)
    return left[0] >= 0


def called_in_a_signal_handler() -> str:
    """A handler that computes on the device itself is refused; the call that it interrupts is right."""
    watch, said = Watch(), []
    want = anyattn.attention(LARGE, LARGE, LARGE, causal=True, backend="cpu")
    attend(LARGE)

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            attend()
            said.append("computed")
        except (VulkanError, anyattn.UnsupportedProblem) as error:
            said.append(str(error))

    signal.signal(signal.SIGALRM, handler)
    for _ in range(10):
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 2e-3)
        assert np.allclose(attend(LARGE), want, atol=1e-5)
        signal.setitimer(signal.ITIMER_REAL, 0)
    watch.finish()
    refused = [text for text in said if "in the middle of a call of this thread" in text]
    assert refused and all(text == "computed" or text in refused for text in said), set(said)
    return f"{len(refused)} refused"


def forked() -> str:
    """A child is refused at once, even while another thread of the parent computes; nobody named: the CPU computes."""
    array = DeviceArray(LARGE)
    attend(), attend(LARGE)
    dispatch.get("vulkan").avoids = lambda problem: []  # type: ignore[method-assign]
    assert anyattn.explain(SMALL, SMALL, SMALL, causal=True).chosen == "vulkan"
    anyattn.attention(SMALL, SMALL, SMALL, causal=True)
    stop, raised = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            attend(LARGE)

    def refused(call: Callable[[], Any]) -> None:
        try:
            call()
        except (VulkanError, anyattn.UnsupportedProblem) as error:
            assert "forked from" in str(error), error
        else:
            raise AssertionError("computed")

    def child() -> None:
        for call in (attend, lambda: attend(LARGE), lambda: attend(LARGE[:, :7]), array.numpy):
            refused(call)
        assert release_memory() == 0
        assert "forked from" in str(anyattn.explain(SMALL, SMALL, SMALL, backend="vulkan"))
        for n in (24, 24, 9):  # what the parent has computed, and what is new
            x = SMALL[:, :n]
            assert np.array_equal(anyattn.attention(x, x, x, causal=True)[:, :9], WANT[:, :9])

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(5):
        raised.append(in_child(child))
    stop.set()
    thread.join()
    assert not any(raised), raised
    assert np.allclose(attend(), WANT, atol=1e-5)
    return f"{len(raised)} children"


def in_child(call: Callable[[], None]) -> int:
    """Return the status of a forked child that makes a call; it is ended if it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(BOUND)
        try:
            call()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def threads_at_once() -> str:
    """The first calls of a process come from four threads."""
    wrong: list[bool] = []

    def work() -> None:
        for _ in range(3):
            wrong.append(not np.allclose(attend(), WANT, atol=1e-5))
            wrong.append(not np.array_equal(DeviceArray(SMALL).numpy(), SMALL))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 24 and not any(wrong), wrong
    assert len(engines._engines) == 1
    return "24 results"


if __name__ == "__main__":
    sys.stdout.write(f"{globals()[sys.argv[1]]()}\n")
