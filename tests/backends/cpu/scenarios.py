"""Scenarios of other programs around a call. Each function runs in a separate process (`python scenarios.py NAME`).

Every result is checked against float64 and must be the same bits as the others; the last line of output is their
digest, by which test_threads.py compares the process with a serial one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import anyattn
from anyattn import testing
from anyattn.backends.cpu import library
from anyattn.config import settings
from anyattn.definition import accuracy
from anyattn.testing import Case, CaseInputs, make_inputs

HANG_SECONDS = 600
CASE = Case("threads", seqlen_q=200, seqlen_k=180, group=2, head_dim=32, causal=True, sink=True, dlse=True)
NAMES = ("dq", "dk", "dv", "dsink")


@cache
def expected(case: Case) -> tuple[CaseInputs, dict[str, accuracy.Expected]]:
    inputs = make_inputs(case)
    return inputs, testing.expected(inputs) | testing.expected(inputs, "backward")


def compute(case: Case = CASE, framework: str = "numpy") -> str:
    """Forward and backward by the native engine, checked; the digest of every bit."""
    inputs, want = expected(case)
    convert = to_torch if framework == "torch" else lambda x: x
    given = {name: convert(x) for name, x in inputs.arguments.items()}
    out, lse = anyattn.attention_forward(**given, backend="cpu")
    dout, dlse = convert(inputs.dout), convert(inputs.dlse)
    grads = anyattn.attention_backward(dout, out=out, lse=lse, dlse=dlse, **given, backend="cpu")
    got = {"out": out, "lse": lse} | {name: getattr(grads, name) for name in NAMES}
    arrays = {name: np.asarray(x) for name, x in got.items()}
    wrong = testing.compare(want, arrays)
    assert not wrong, wrong
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays.values())).hexdigest()


def to_torch(x: Any) -> Any:
    import torch

    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def busy_torch() -> None:
    """An operation on every thread of torch."""
    import torch

    x = torch.ones(600, 600)
    assert float((x @ x).sum()) == 600.0**3


def runtime() -> str:
    return library.load().thread_runtime()


def threads() -> int:
    """Return the number of threads of this process, as the system counts them."""
    return len(list(Path("/proc/self/task").iterdir()))


def one(*digests: str) -> str:
    assert len(set(digests)) == 1, "the same problem gave other bits"
    return digests[0]


def serial() -> str:
    return compute()


# Beside torch.


def choose_pool(name: str) -> None:
    """Choose whose threads compute: without a choice, a busy machine decides, and the number of threads with it."""
    os.environ["ANYATTN_THREAD_POOL"] = name
    settings.reload()


def beside_torch() -> str:
    """One OpenMP runtime for both, so threads are counted once."""
    choose_pool("openmp")
    busy_torch()
    found = [compute(framework="torch"), compute()]
    assert runtime() in ("libgomp", "libomp", "libiomp5")
    before = threads()
    for _ in range(10):
        busy_torch()
        found += [compute(framework="torch"), compute()]
    assert threads() == before
    return one(*found)


def own_pool_beside_torch() -> str:
    choose_pool("own")
    busy_torch()
    found = [compute(framework="torch"), compute()]
    assert runtime() == "anyattn"
    if library.load().num_threads() > 1:
        assert "anyattn" in names_of_threads()
    choose_pool("openmp")
    assert runtime() != "anyattn"
    return one(*found, compute(framework="torch"))


def torch_comes_later() -> str:
    found = [compute()]
    assert runtime() == "anyattn" and "torch" not in sys.modules
    busy_torch()
    found += [compute(), compute(framework="torch")]
    assert runtime() != "anyattn"
    return one(*found)


def one_thread_of_torch() -> str:
    import torch

    torch.set_num_threads(1)
    before = threads()
    found = [compute(framework="torch"), compute()]
    assert threads() == before and library.load().num_threads() == 1
    return one(*found)


def one_thread_of_torch_in_python_threads() -> str:
    """OpenMP counts for each thread alone; torch tells a new thread at its first operation, and so do we."""
    import torch

    torch.set_num_threads(1)
    found = []
    before = threads()

    def work() -> None:
        found.append(compute(framework="torch"))
        assert threads() == before + 1 and library.load().num_threads() == 1
        found.append("done")

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        while threads() > before:  # the system ends a thread a little after Python does
            time.sleep(0.001)
    assert found[1::2] == ["done"] * 3
    return one(*found[::2])


class Digests:
    """A data set whose samples are computed by attention in the loader's workers."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> str:
        assert multiprocessing.parent_process() is not None
        return compute(framework=("numpy", "torch")[index % 2])


def data_loader_fork() -> str:
    return _data_loader("fork")


def data_loader_spawn() -> str:
    return _data_loader("spawn")


def _data_loader(method: str) -> str:
    from torch.utils.data import DataLoader

    busy_torch()
    found = [compute(framework="torch")]
    for _ in range(2 if method == "fork" else 1):
        loader = DataLoader(Digests(), batch_size=None, num_workers=2, multiprocessing_context=method)  # type: ignore[arg-type]
        found += list(loader)
    return one(*found, compute(framework="torch"))


# Forked children.


def in_child(work: Any) -> None:
    """Runs `work` in a forked child, which must end well."""
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
    assert os.waitpid(child, 0)[1] == 0


def fork_own_pool() -> str:
    found = [compute()]
    assert runtime() == "anyattn"
    return _family(found)


def fork_openmp() -> str:
    busy_torch()
    return _family([compute(framework="torch"), compute()])


def fork_both() -> str:
    """Both kinds of threads were at work before the fork."""
    found = [compute()]
    assert runtime() == "anyattn"
    busy_torch()
    found.append(compute(framework="torch"))
    assert runtime() != "anyattn"
    return _family(found)


def _family(found: list[str]) -> str:
    want = one(*found)
    frameworks = ("numpy", "torch") if "torch" in sys.modules else ("numpy",)

    def work() -> None:
        assert runtime() == "anyattn"
        for framework in frameworks:
            one(want, compute(framework=framework), compute(framework=framework))

    in_child(lambda: (work(), in_child(work), work()))
    in_child(lambda: in_child(work))  # the grandchild first
    return one(want, compute())


def torch_comes_after_the_fork() -> str:
    """A runtime that the child itself loaded is its own."""
    want = compute()

    def work() -> None:
        busy_torch()
        one(want, compute(framework="torch"), compute())
        assert runtime() != "anyattn"

    in_child(work)
    return one(want, compute())


def multiprocessing_fork() -> str:
    want = compute()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return one(want, *pool.map(_map, range(6)))


def _map(_: int) -> str:
    return compute()


def fork_beside_a_caller() -> str:
    return _fork_beside_a_caller()


def fork_beside_a_caller_with_torch() -> str:
    busy_torch()
    return _fork_beside_a_caller()


def _fork_beside_a_caller() -> str:
    """A fork while another Python thread is somewhere inside a call."""
    want, stop = compute(), threading.Event()
    found = []

    def call() -> None:
        while not stop.is_set():
            found.append(compute())

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for _ in range(30):
            in_child(lambda: one(want, compute()))
    finally:
        stop.set()
        caller.join()
    return one(want, *found)


# Several callers, and calls inside calls.


def python_threads() -> str:
    """Eight callers, different problems, both frameworks: what each computes alone."""
    dtypes = ("float32", "float16", "bfloat16", "float64")
    cases = [replace(CASE, seed=seed, dtype=dtypes[seed % 4], seqlen_q=100 + 30 * seed) for seed in range(8)]
    alone = [compute(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for framework in ("numpy", "torch", "numpy"):
            todo = [case for case in cases if framework == "numpy" or case.dtype != "bfloat16"]
            for case, got in zip(todo, pool.map(compute, todo, [framework] * 8), strict=True):
                one(alone[cases.index(case)], got)
        list(pool.map(compute, cases * 3))
        callers, each = 8 + 1, max(1, library.load().num_threads())
        assert threads() <= 2 + callers * each + each  # OpenMP's for each caller, our own, and faulthandler's
    return compute()


def first_calls_at_once() -> str:
    """Nothing is loaded, imported or cached when eight threads begin."""
    sys.setswitchinterval(1e-6)
    barrier = threading.Barrier(8)

    def call(index: int) -> str:
        barrier.wait()
        return compute(framework=("numpy", "torch")[index % 2])

    with ThreadPoolExecutor(8) as pool:
        return one(*pool.map(call, range(8)))


def short_lived_threads() -> str:
    """Check that OpenMP threads, scratch memory and plans of a Python thread end with the thread."""
    busy_torch()
    found = [compute(framework="torch")]
    before = threads()
    for _ in range(30):
        thread = threading.Thread(target=lambda: found.append(compute(framework="torch")))
        thread.start()
        thread.join()
    while threads() > before:  # they end by themselves; the watchdog ends an endless wait
        time.sleep(0.01)
    return one(*found)


def python_threads_and_reloads() -> str:
    """Settings that change while others call: plans are forgotten, results are not."""
    stop = threading.Event()
    sys.setswitchinterval(1e-6)

    def reload() -> None:
        while not stop.is_set():
            settings.reload()

    other = threading.Thread(target=reload)
    other.start()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compute(), range(40)))
    stop.set()
    other.join()
    return one(*found)


def inside_openmp() -> str:
    """Called by every thread of somebody's parallel region."""
    choose_pool("openmp")
    busy_torch()
    torch_gomp = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line]
    gomp = ctypes.CDLL(torch_gomp[0])
    found: list[str] = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(compute()))
    gomp.GOMP_parallel(body, None, 3, 0)
    before = threads()
    gomp.GOMP_parallel(body, None, 3, 0)
    assert len(found) == 6 and threads() == before
    return one(*found, compute(), compute(framework="torch"))


# The end, and what comes in between.


def interrupted() -> str:
    """Check that Ctrl+C at any moment raises after the call, and that the next call is right."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background inherits that it is ignored
    found, interrupts = [compute()], 0
    pid = os.getpid()
    ready, done = threading.Event(), threading.Event()

    def press() -> None:
        """Once, some time after the loop says that it is ready again."""
        while ready.wait() and not done.wait(0.003):
            ready.clear()
            os.kill(pid, signal.SIGINT)

    other = threading.Thread(target=press)
    other.start()
    while interrupts < 20:
        try:
            ready.set()
            while True:
                found.append(compute())
        except KeyboardInterrupt:
            interrupts += 1
    done.set()
    ready.set()
    other.join()
    return one(*found, compute())


def unloaded() -> str:
    """The last handle is closed while threads sleep inside the library: it stays."""
    import _ctypes

    digest = compute()
    native = library.load()
    for _ in range(3):
        _ctypes.dlclose(native._dll._handle)
    assert str(native.path) in Path("/proc/self/maps").read_text()
    return one(digest, compute())


def exit_from_a_thread() -> str:
    """The process ends while another Python thread is inside a call."""
    digest = compute()

    def forever() -> None:
        while True:
            compute()

    threading.Thread(target=forever, daemon=True).start()
    return one(digest, compute())


# How many threads.


def one_processor() -> str:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = threads()
    digest = compute()
    assert library.load().num_threads() == 1 and threads() == before
    return digest


def names_of_threads() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def by_omp_num_threads() -> str:
    """Check that the variable sets the number of threads, up to the number of processors."""
    count = min(int(os.environ["OMP_NUM_THREADS"].split(",")[0]), len(os.sched_getaffinity(0)))
    assert "torch" not in sys.modules and runtime() == "anyattn" and library.load().num_threads() == count
    digest = compute()
    deadline = time.monotonic() + 60
    while names_of_threads().count("anyattn") != count - 1:  # and the calling one; a thread names itself once it runs
        assert time.monotonic() < deadline, names_of_threads()
    import torch

    found = [digest, compute(framework="torch"), compute()]
    assert torch.get_num_threads() == library.load().num_threads()  # torch's mathematical library may have its own mind
    return one(*found)


def main(scenarios: dict[str, Any]) -> None:
    """Runs the one that the command line names; a hang ends with the stack of every thread."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    sys.stdout.write(f"{scenarios[sys.argv[1]]()}\n")


if __name__ == "__main__":
    main(globals())
