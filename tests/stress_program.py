"""One random program of the stress test: it disturbs attention calls in every way that a process can.

`stress.py` starts it, `python stress_program.py SEED EXPECTED`, and judges how it ends. EXPECTED is the file of digests
that `--serial` prints: whatever goes on around a call, it gives those bits or raises.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import anyattn
from anyattn import testing
from anyattn.config import settings
from anyattn.testing import Case, CaseInputs, make_inputs
from backends.cpu.scenarios_memory import limited_memory

BOUND = 60  # seconds that a child of a program may take
TOO_LONG = 100  # seconds after which a program shows the stack of every thread and ends
STEPS = 25
ENDS = ("return", "exit", "exit_beside_calls", "terminated_beside_calls", "interrupted")

CASES = (
    Case("tiny", seqlen_q=1, seqlen_k=17, group=2, head_dim=16),
    Case("decode", seqlen_q=1, seqlen_k=700, group=4, head_dim=64, batch=2),
    Case("small", seqlen_q=65, seqlen_k=80, group=2, head_dim=32, causal=True, sink=True, dlse=True),
    Case("half", seqlen_q=130, seqlen_k=130, head_dim=64, dtype="bfloat16", causal=True),
    Case("double", seqlen_q=40, seqlen_k=90, head_dim=40, dtype="float64", softcap=3.0),
    Case("bias", seqlen_q=100, seqlen_k=120, head_dim=32, bias="full", dropout_p=0.2),
    Case("long", seqlen_q=900, seqlen_k=900, head_dim=64, nheads_kv=4, causal=True),
)


class Disturbed(Exception):
    """The exception that a signal handler raises during a call."""


@cache
def inputs_of(index: int) -> CaseInputs:
    return make_inputs(CASES[index])


def results(index: int, framework: str = "numpy") -> dict[str, np.ndarray]:
    """Return what the CPU engine computes, forward and backward."""
    inputs = inputs_of(index)
    convert = _to_torch if framework == "torch" else lambda x: x
    given = {name: convert(x) for name, x in inputs.arguments.items()}
    out, lse = anyattn.attention_forward(**given, backend="cpu")
    dlse = None if inputs.dlse is None else convert(inputs.dlse)
    grads = anyattn.attention_backward(convert(inputs.dout), out=out, lse=lse, dlse=dlse, **given, backend="cpu")
    found = {"out": out, "lse": lse} | {name: getattr(grads, name) for name in ("dq", "dk", "dv")}
    return {name: np.asarray(x) for name, x in found.items()}


def _to_torch(x: Any) -> Any:
    import torch

    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def digest(arrays: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays.values())).hexdigest()


def serial() -> dict[str, str]:
    """Return the digest of each problem, computed on one thread and checked against float64."""
    digests = {}
    for index, case in enumerate(CASES):
        inputs, got = inputs_of(index), results(index)
        wrong = testing.compare(testing.expected(inputs), got)
        wrong += testing.compare({n: x for n, x in testing.expected(inputs, "backward").items() if n in got}, got)
        assert not wrong, (case, wrong)
        digests[case.name] = digest(got)
    return digests


class Program:
    """Random steps, each a disturbance around calls that must give the expected bits."""

    def __init__(self, seed: int, expected: dict[str, str]) -> None:
        self.rng = random.Random(seed)
        self.expected = expected
        self.torch = self.rng.random() < 0.6
        self.vulkan = self.rng.random() < 0.2 and "vulkan" in anyattn.get_available_backends()
        self.calls = 0
        self.stopping = False
        self.wrong: list[str] = []
        self.processors = os.sched_getaffinity(0)

    # Calls.

    def call(self, index: int | None = None, framework: str = "") -> None:
        """Compute one problem and compare every bit."""
        index = self.rng.randrange(len(CASES)) if index is None else index
        if not framework:
            framework = self.rng.choice(("numpy", "torch")) if self.torch else "numpy"
        if CASES[index].dtype == "bfloat16":  # NumPy's bfloat16 is another package's
            framework = "numpy"
        found = digest(results(index, framework))
        self.calls += 1
        assert found == self.expected[CASES[index].name], f"{CASES[index].name} gave other bits by {framework}"

    def calls_in_thread(self, framework: str = "") -> None:
        """Compute until the program ends. Errors are reported at the end."""
        rng = random.Random(self.rng.random())
        while not self.stopping:
            try:
                self.call(rng.randrange(len(CASES) - 1), framework)
            except AssertionError as error:
                self.wrong.append(str(error))
            except MemoryError:  # another step took it
                time.sleep(0.001)

    # Disturbances.

    def many_threads(self) -> None:
        with ThreadPoolExecutor(self.rng.choice((2, 5))) as pool:
            list(pool.map(self.call, [self.rng.randrange(len(CASES)) for _ in range(10)]))

    def forked(self) -> None:
        def work() -> None:
            self.call()
            if self.rng.random() < 0.3:
                in_child(self.call)

        in_child(work)
        self.call()

    def spawned(self) -> None:
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=_spawned, args=(self.rng.random(), self.expected))
        child.start()
        child.join(BOUND)
        assert child.exitcode == 0, f"a spawned child ended with {child.exitcode} (None: it hangs)"

    def refused(self) -> None:
        x = np.ones((1, 3, 2, 8), np.float32)
        for arguments, error in (({"window": (-5, 1)}, ValueError), ({"softcap": "much"}, TypeError)):
            with suppress(error):
                anyattn.attention(x, x, x, **arguments, backend="cpu")
                raise AssertionError("nonsense was accepted")
            self.call()

    def number_of_threads(self) -> None:
        anyattn.set_num_threads(self.rng.choice((0, 1, 2, 3, 7)))
        with anyattn.num_threads(self.rng.choice((1, 5))):
            self.call()
        self.call()

    def affinity(self) -> None:
        os.sched_setaffinity(0, {self.rng.choice(sorted(self.processors))})
        self.call()
        os.sched_setaffinity(0, self.processors)
        self.call()

    def reloaded(self) -> None:
        settings.reload()
        self.call()

    def flushed_denormals(self) -> None:
        """The caller's floating-point state is its own: what this thread computes follows it, other steps do not."""
        if self.torch:
            import torch

            if torch.set_flush_denormal(True):
                self.call(framework="torch")
                torch.set_flush_denormal(False)
        self.call()

    def little_memory(self) -> None:
        with limited_memory(self.rng.choice((1, 20, 200))), suppress(MemoryError):
            self.call()
        self.call()

    def interrupted(self) -> None:
        """A handler raises at a random moment of a call."""
        for _ in range(5):
            with suppress(Disturbed), ticking(_raise, self.rng.uniform(1e-4, 0.03)):
                while True:
                    self.call(self.rng.choice((2, len(CASES) - 1)))
            self.call()

    def called_in_a_handler(self) -> None:
        """A handler computes in the middle of a call of the same thread."""
        handled = []

        def compute(*_: object) -> None:
            self.call(0)
            handled.append(True)

        with ticking(compute, 0.004, again=True):
            for _ in range(4):
                self.call()
            deadline = time.monotonic() + BOUND
            while not handled:
                assert time.monotonic() < deadline, "the handler was never called"
                self.call(0)

    def exception_from_elsewhere(self) -> None:
        """Make another thread raise, as notebooks and timeouts do."""
        ended = []

        def work() -> None:
            try:
                while True:
                    self.call(1)
            except Disturbed:
                ended.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(self.rng.uniform(0, 0.03))
        deadline = time.monotonic() + BOUND
        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        while thread.is_alive():
            assert time.monotonic() < deadline, "a thread hangs"
            raise_in(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Disturbed))
            thread.join(0.2)
        self.call()

    def nested_openmp(self) -> None:
        """Every thread of somebody's parallel region calls."""
        if not self.torch:
            return self.call()
        maps = Path("/proc/self/maps").read_text().splitlines()
        gomp = ctypes.CDLL(next(line.split()[-1] for line in maps if "libgomp" in line))
        errors: list[BaseException] = []

        def body(_: object) -> None:
            try:
                self.call(framework="torch")
            except BaseException as error:
                errors.append(error)

        gomp.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body), None, 3, 0)
        assert not errors, errors
        return self.call()

    def short_lived_threads(self) -> None:
        for _ in range(5):
            thread = threading.Thread(target=self.call)
            thread.start()
            thread.join()
        gc.collect()

    def on_a_device(self) -> None:
        """Calls on a Vulkan device: right in a moment, interrupted in the next, refused after a fork."""
        self.device_call()
        with suppress(Disturbed), ticking(_raise, self.rng.uniform(1e-4, 0.02)):
            while True:
                self.device_call()
        in_child(self.refused_device_call)
        self.device_call()

    def lost_device(self) -> None:
        from anyattn.backends.vulkan import api
        from anyattn.backends.vulkan.engine import current_engine

        current_engine().commands._submit = lambda *_: api.LOST  # type: ignore[method-assign,assignment]
        try:
            self.device_call()
        except (api.DeviceLost, anyattn.UnsupportedProblem) as error:  # in the call, or in the driver's test before it
            assert "device lost" in str(error), error
        else:
            raise AssertionError("a lost device computed")
        self.device_call()

    def device_call(self) -> None:
        inputs = inputs_of(2)
        out, _ = anyattn.attention_forward(**inputs.arguments, backend="vulkan")
        assert not testing.compare({"out": testing.expected(inputs)["out"]}, {"out": out})
        self.calls += 1

    def refused_device_call(self) -> None:
        from anyattn.backends.vulkan.api import VulkanError

        try:
            self.device_call()
        except (VulkanError, anyattn.UnsupportedProblem) as error:  # by the plan of the parent, or by a new one
            assert "forked" in str(error), error
            self.call()
        else:
            raise AssertionError("a forked child used its parent's device")

    def steps(self) -> list[Callable[[], None]]:
        common = [self.call, self.many_threads, self.forked, self.number_of_threads, self.affinity, self.reloaded]
        common += [self.interrupted, self.called_in_a_handler, self.exception_from_elsewhere, self.nested_openmp]
        common += [self.on_a_device, self.lost_device] * self.vulkan
        return [*common * 2, self.refused, self.flushed_denormals, self.little_memory, self.short_lived_threads]

    # The whole.

    def run(self) -> None:
        for index in range(len(CASES)):
            self.call(index)  # modules of a first call are imported already; the tests of threads interrupt imports
        if self.torch:
            self.call(0, "torch")
        beside = [
            threading.Thread(target=self.calls_in_thread, daemon=True) for _ in range(self.rng.choice((0, 0, 1, 2)))
        ]
        for thread in beside:
            thread.start()
        chosen = self.rng.choices(self.steps(), k=STEPS)
        if self.rng.random() < 0.2:
            chosen.append(self.spawned)
        for step in chosen:
            self.step = step.__name__
            step()
        self.end(self.rng.choice(ENDS), beside)

    def end(self, how: str, beside: list[threading.Thread]) -> None:
        self.stopping = True
        for thread in beside:
            thread.join(BOUND)
            assert not thread.is_alive(), "a thread hangs"
        if how.endswith("_beside_calls"):  # by NumPy: PyTorch's operators abort a process that ends while they run
            self.stopping = False
            threading.Thread(target=self.calls_in_thread, args=("numpy",), daemon=True).start()
            time.sleep(self.rng.uniform(0, 0.02))
        assert not self.wrong, self.wrong
        status = {
            "exit": 3,
            "exit_beside_calls": 4,
            "terminated_beside_calls": -signal.SIGTERM,
            "interrupted": -signal.SIGINT,
        }
        print(json.dumps({"calls": self.calls, "end": how, "status": status.get(how, 0)}), flush=True)  # noqa: T201
        if how.startswith("exit"):
            sys.exit(status[how])
        if how == "terminated_beside_calls":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(BOUND)
        if how == "interrupted":
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
            deadline = time.monotonic() + BOUND
            while time.monotonic() < deadline:
                self.call()
            raise AssertionError("Ctrl+C did not end the program")


def _spawned(seed: float, expected: dict[str, str]) -> None:
    program = Program(0, expected)
    program.rng.seed(seed)
    for _ in range(3):
        program.call()


def _raise(*_: object) -> None:
    raise Disturbed


@contextmanager
def ticking(handler: Callable[..., None], seconds: float, again: bool = False) -> Iterator[None]:
    """Have SIGALRM come after so many seconds, once or again and again."""
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds if again else 0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_child(work: Callable[[], None]) -> None:
    """Run `work` in a forked child, which must end well and in time."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"child: {error!r}\n")
        finally:
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + BOUND
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)
            raise AssertionError("a forked child hangs")
        time.sleep(0.001)
    assert ended[1] == 0, f"a forked child ended with wait status {ended[1]:#x}"


def main() -> None:
    if sys.argv[1] == "--serial":
        print(json.dumps(serial()))  # noqa: T201
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background inherits that it is ignored
    faulthandler.enable()
    faulthandler.dump_traceback_later(TOO_LONG, exit=True)
    program = Program(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    try:
        program.run()
    except Exception:
        sys.stderr.write(f"in step {getattr(program, 'step', 'start')}\n")
        raise


if __name__ == "__main__":
    main()
