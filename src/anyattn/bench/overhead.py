"""Overhead of a call in addition to arithmetic: small calls, the first call of a process, features off and on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from .timing import measure, summary

Functions = Mapping[str, Callable[[], Any]]

CALLS = 50  # in one sample, because reading the clock takes 0.05 us
SMALL = ((1, 1, 16, 64), (1, 8, 64, 64))

FIRST = """
import json, sys, time
import numpy as np
kind = sys.argv[1]
if kind == "torch":
    import torch
start = time.perf_counter()
import anyattn
imported = time.perf_counter() - start
x = np.ones((1, 512, 8, 64), np.float32) if kind == "numpy" else torch.ones(1, 512, 8, 64)
times = []
for _ in range(2):
    start = time.perf_counter()
    anyattn.attention(x, x, x, causal=True)
    times.append(time.perf_counter() - start)
print(json.dumps({"import": imported, "first": times[0], "second": times[1]}))
"""


def small_calls(seconds: float = 1.0) -> dict[str, dict[str, Any]]:
    """Return shape -> call -> seconds per call, for torch tensors with and without gradients and for NumPy arrays."""
    return {str(shape): _small(shape, seconds) for shape in SMALL}


def _small(shape: tuple[int, int, int, int], seconds: float) -> dict[str, Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from .. import attention

    b, h, n, d = shape
    x = torch.ones(b, n, h, d)
    y = x.transpose(1, 2).contiguous()
    array = x.numpy()
    x_grad, y_grad = x.clone().requires_grad_(), y.clone().requires_grad_()
    return in_bulk(
        {
            "anyattn": lambda: attention(x, x, x),
            "torch SDPA": lambda: scaled_dot_product_attention(y, y, y),
            "anyattn, gradients recorded": lambda: attention(x_grad, x_grad, x_grad),
            "torch SDPA, gradients recorded": lambda: scaled_dot_product_attention(y_grad, y_grad, y_grad),
            "anyattn, NumPy": lambda: attention(array, array, array),
        },
        seconds,
    )


def in_bulk(functions: Functions, seconds: float, calls: int = CALLS) -> dict[str, Any]:
    """Measure like `measure`, with `calls` calls per sample."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 3:
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            samples[name].append((time.perf_counter() - start) / calls)
    return {name: asdict(summary(times)) for name, times in samples.items()}


def first_call(repeats: int = 3) -> dict[str, dict[str, float]]:
    """Return seconds of `import anyattn`, the first and the second call, in new processes; the minimum of a few."""
    found = {}
    for kind in ("numpy", "torch"):
        runs = [_first(kind) for _ in range(repeats)]
        found[kind] = {name: min(run[name] for run in runs) for name in runs[0]}
    return found


def _first(kind: str) -> dict[str, float]:
    result = subprocess.run([sys.executable, "-c", FIRST, kind], capture_output=True, text=True, check=True)
    return {name: float(value) for name, value in json.loads(result.stdout).items()}


def features(seconds: float = 4.0, seqlen: int = 2048) -> dict[str, dict[str, Any]]:
    """Return dtype -> feature -> seconds at (1, 8, seqlen, 64), alternating to compare each with the plain call."""
    return {dtype: _features(dtype, seconds, seqlen) for dtype in ("float32", "bfloat16")}


def _features(dtype: str, seconds: float, seqlen: int) -> dict[str, Any]:
    import torch

    from .. import attention

    kind = getattr(torch, dtype)
    q, k, v = (torch.randn(1, seqlen, 8, 64).to(kind) for _ in range(3))
    slopes, sink = 2.0 ** -torch.arange(1.0, 9.0), torch.zeros(8)
    off: dict[str, Any] = {"softcap": 0.0, "chunk": 0, "window": None, "dropout_p": 0.0, "bias": None, "mask": None}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "all off": off,
        "window wider than the sequence": {"window": (seqlen, seqlen)},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": slopes},
        "sink": {"sink": sink},
        "mask of ones": {"mask": torch.ones(1, 1, seqlen, seqlen, dtype=torch.bool)},
        "dense bias": {"bias": torch.zeros(1, 8, seqlen, seqlen, dtype=kind)},
        "key bias": {"bias": torch.zeros(1, 1, 1, seqlen, dtype=kind)},
        "dropout 0.1": {"dropout_p": 0.1, "seed": 1},
    }
    functions: Functions = {name: _bound(attention, (q, k, v), given) for name, given in options.items()}
    return {name: asdict(timing) for name, timing in measure(functions, seconds).items()}


def _bound(function: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: function(*arrays, **options)
