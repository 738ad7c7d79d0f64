"""Signals during long calls, each function in a process of its own: `python scenarios_signals.py NAME`."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import anyattn
from backends.cpu.scenarios import compute, main, one

LONGEST_WAIT = 2  # seconds from a signal to its exception, on a busy machine; about 0.05 on an idle one
ROUNDS = 5
Results = tuple[np.ndarray, ...]


def arrays(seqlen: int = 4096) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, seqlen, 8, 64), dtype=np.float32) for _ in range(3)]


def forward() -> str:
    q, k, v = arrays()
    return _interrupt(lambda: (anyattn.attention(q, k, v, backend="cpu"),), (q, k, v))


def backward() -> str:
    q, k, v = arrays()
    out, lse = anyattn.attention_forward(q, k, v, backend="cpu")
    return _interrupt(lambda: anyattn.attention_backward(q, q, k, v, out, lse, backend="cpu")[:3], (q, k, v, out, lse))


def torch_autograd() -> str:
    import torch

    q, k, v = (torch.from_numpy(x).requires_grad_() for x in arrays())

    def call() -> Results:
        grads = torch.autograd.grad(anyattn.attention(q, k, v, backend="cpu").sum(), (q, k, v))
        return tuple(grad.numpy() for grad in grads)

    return _interrupt(call, tuple(x.detach().numpy() for x in (q, k, v)))


def numpy_backend() -> str:
    q, k, v = arrays(2048)
    return _interrupt(lambda: (anyattn.attention(q, k, v, backend="numpy"),), (q, k, v))


def _interrupt(call: Callable[[], Results], inputs: Results) -> str:
    """Ctrl+C at random moments raises soon; inputs are intact, and the next call gives the same bits."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background inherits that it is ignored
    digest, before = compute(), [x.tobytes() for x in inputs]
    start = time.monotonic()
    want = [x.tobytes() for x in call()]
    seconds = time.monotonic() - start
    rng, waits = random.Random(1), []
    for _ in range(ROUNDS):
        sent = Signal(signal.SIGINT, 0.8 * seconds * rng.random())
        ended = False
        try:
            call()
            ended = True
            sent.wait()
        except KeyboardInterrupt:
            waits += [] if ended else [time.monotonic() - sent.at]
        assert [x.tobytes() for x in inputs] == before
    assert [x.tobytes() for x in call()] == want
    sys.stdout.write(f"milliseconds from signal to exception: {[round(1000 * wait) for wait in waits]}\n")
    assert waits, "no signal came during a call"
    assert max(waits) < LONGEST_WAIT, waits
    return one(digest, compute())


class Signal:
    """A signal that another thread sends to this process after a while."""

    def __init__(self, number: int, delay: float) -> None:
        self.at = 0.0
        self._number, self._delay = number, delay
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        time.sleep(self._delay)
        self.at = time.monotonic()
        os.kill(os.getpid(), self._number)

    def wait(self) -> None:
        self._thread.join()
        time.sleep(0.01)


def handler_that_returns() -> str:
    """The call goes on while the handler runs, and is right; the handler may compute itself."""
    q, k, v = arrays()
    want = anyattn.attention(q, k, v, backend="cpu").tobytes()
    digests: list[str] = []
    calls: list[float] = []

    def handler(*_: Any) -> None:
        calls.append(time.monotonic())
        digests.append(compute())

    signal.signal(signal.SIGUSR1, handler)
    ends = []
    for _ in range(ROUNDS):
        sent = Signal(signal.SIGUSR1, 0.02)
        got = anyattn.attention(q, k, v, backend="cpu").tobytes()
        ends.append(time.monotonic())
        sent.wait()
        assert got == want
    assert len(calls) == ROUNDS and any(call < end for call, end in zip(calls, ends, strict=True))
    return one(*digests, compute())


def handler_that_raises_another() -> str:
    """The exception is the handler's own, with its traceback."""
    q, k, v = arrays()

    def out_of_time(*_: Any) -> None:
        raise TimeoutError("took too long")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        while True:
            anyattn.attention(q, k, v, backend="cpu")
    except TimeoutError as error:
        assert str(error) == "took too long"
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        assert last is not None and last.tb_frame.f_code.co_name == "out_of_time"
    return compute()


def another_thread_goes_on() -> str:
    """Signals are the main thread's: a call of another thread ends as ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    q, k, v = arrays()
    want = anyattn.attention(q, k, v, backend="cpu").tobytes()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(lambda: anyattn.attention(q, k, v, backend="cpu").tobytes())
        sent = Signal(signal.SIGINT, 0.02)
        try:
            sent.wait()
            raise AssertionError("no signal came")
        except KeyboardInterrupt:
            pass
        assert future.result() == want
    return compute()


if __name__ == "__main__":
    main(globals())
