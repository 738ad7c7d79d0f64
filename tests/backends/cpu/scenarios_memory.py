"""Memory that is not there, each function in a process of its own: `python scenarios_memory.py NAME`."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import anyattn
from anyattn.config import settings
from backends.cpu.scenarios import busy_torch, compute, main, one, to_torch


def no_memory_numpy() -> str:
    return _no_memory("numpy")


def no_memory_torch() -> str:
    busy_torch()
    return _no_memory("torch")


def _no_memory(framework: str) -> str:
    """Check that a failed allocation raises MemoryError with its size, and that the next call is right."""
    digest = compute(framework=framework)
    convert = to_torch if framework == "torch" else lambda x: x
    # One head: the backward adds up partial sums of dk and dv, 16 times as large as the results.
    q, k, v, dout = (convert(np.ones((1, n, 1, 64), np.float32)) for n in (2000, 60000, 60000, 2000))
    flags = {"backend": "cpu", "window": (3, 3)}
    out, lse = anyattn.attention_forward(q, k, v, **flags)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with limited_memory(200):
        refuses(lambda: anyattn.attention_backward(dout, q, k, v, out, lse, **flags), "workspace", 2**28)
        rows = convert(np.broadcast_to(np.ones(64, np.float32), (1, 2**20, 1, 64)))
        refuses(lambda: anyattn.attention_forward(rows, k, v, **flags), "1048576, 1, 64", 0)  # out itself
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    grads = anyattn.attention_backward(dout, q, k, v, out, lse, **flags)
    assert np.isfinite(np.asarray(grads.dk)).all()
    return one(digest, compute(framework=framework))


def no_memory_for_threads() -> str:
    """A new thread of the program, whose team of PyTorch's OpenMP does not exist: its own threads have no stacks."""
    import threading

    one_thread = compute()
    busy_torch()
    started, limited, found = threading.Event(), threading.Event(), list[str]()

    def call() -> None:
        started.set()
        limited.wait()
        found.append(compute())

    thread = threading.Thread(target=call)
    thread.start()
    started.wait()
    with limited_memory(6):  # a stack takes 8
        limited.set()
        thread.join()
    return one(one_thread, *found, compute())


def no_memory_for_scratch() -> str:
    """Scratch for 4,096 threads, asked for by the engine itself: what the results held before stays."""
    import anyattn.frameworks.numpy as adapter

    one_thread = compute()
    filled: list[np.ndarray] = []

    def empty(self: Any, shape: Any, dtype: str, like: np.ndarray) -> np.ndarray:
        array: np.ndarray = original(self, shape, dtype, like)
        if dtype != "uint8":  # workspace
            array[...] = 77
            filled.append(array)
        return array

    original, adapter.NumpyAdapter.empty = adapter.NumpyAdapter.empty, empty  # type: ignore[method-assign]
    os.environ["ANYATTN_NUM_THREADS"] = "4096"
    settings.reload()
    x = np.ones((1, 300, 2, 64), np.float32)
    out, lse = x, np.ones((1, 2, 300), np.float32)
    with limited_memory(100):
        refuses(lambda: anyattn.attention_forward(x, x, x, backend="cpu"), "scratch", 2**27)
        refuses(lambda: anyattn.attention_backward(x, x, x, x, out, lse, backend="cpu"), "scratch", 2**27)
    assert len(filled) == 5 and all((array == 77).all() for array in filled)
    adapter.NumpyAdapter.empty = original  # type: ignore[method-assign]
    return one(one_thread, compute())


@contextmanager
def limited_memory(mib: int) -> Iterator[None]:
    """Limit the address space to what is in use now plus `mib`."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refuses(call: Callable[[], Any], what: str, least: int) -> None:
    """A MemoryError that names at least so many bytes."""
    try:
        call()
    except MemoryError as error:
        numbers = [int(number) for number in re.findall(r"\d+", str(error))]
        assert what in str(error) and max(numbers) >= least, error
    else:
        raise AssertionError("memory that is not there was used")


if __name__ == "__main__":
    main(globals())
