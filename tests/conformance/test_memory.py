"""O(N) memory: at 8,192 tokens one matrix of scores would be 256 MiB; a whole forward and backward stays far below."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.backends import engines

LENGTH = 8192
# Beyond inputs, results and gradients (2 MiB each): tiles, threads, and partial sums of dk and dv (64 MiB here).
LIMIT_MIB = 96

CODE = """
import re, sys
from pathlib import Path
import numpy as np
import anyattn

status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

def peak():
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text()).group(1)) / 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)

length, backend = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
def run(n):
    q, k, v, dout = (rng.standard_normal((1, n, 1, 64), np.float32) for _ in range(4))
    flags = {"causal": True, "backend": backend, "bias": np.zeros((1, 1, 1, n), np.float32)}
    out, lse = anyattn.attention_forward(q, k, v, **flags)
    return q, k, v, dout, out, lse, anyattn.attention_backward(dout, q, k, v, out, lse, **flags)
run(64)  # libraries, threads and tiles are there
if clear.exists():
    clear.write_text("5")
before = peak()
arrays = run(length)
print(peak() - before)
"""


def growth(length: int, backend: str) -> float:
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(length), backend],
        env={**os.environ, "ANYATTN_CPU_TARGET": "", "ANYATTN_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
    )
    return float(result.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of a process is read in the Unix way")
@pytest.mark.parametrize("backend", sorted({engine.backend for engine in engines() if not engine.interpreted}))
def test_peak_memory_is_linear(backend: str) -> None:
    results = 8 * LENGTH * 64 * 4 / 2**20  # q, k, v, dout, out, dq, dk, dv
    assert growth(LENGTH, backend) <= results + LIMIT_MIB
