"""Seconds and memory of tangents and second derivatives, compared with PyTorch's math path.

The math path is PyTorch's only implementation of scaled_dot_product_attention with these derivatives.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import memory
from .timing import measure as measure_times

if TYPE_CHECKING:
    from torch import Tensor

SHAPE, QUICK_SHAPE = (1, 8, 2048, 64), (1, 8, 512, 64)
PASSES = {
    "forward": "forward",
    "tangent of q": "forward with the tangent along tq",
    "tangents": "forward with the tangent along tq, tk and tv",
    "backward": "gradients, after a forward pass",
    "second": "gradients of the gradients, along tq, tk and tv",
}
TOLERANCE = 1e-3  # relative to the largest value; both results are float32

Attend = Callable[..., Any]
Row = dict[str, Any]


def measure(threads: int, seconds: float, quick: bool = False) -> list[Row]:
    """Return one row for each pass: seconds, and MiB in addition to the inputs, for each provider."""
    shape = QUICK_SHAPE if quick else SHAPE
    rows = []
    for name, description in PASSES.items():
        calls = {provider: prepare(provider, name, shape) for provider in PROVIDERS}
        problem = wrong({provider: call() for provider, call in calls.items()})
        timings = {} if problem else measure_times(calls, seconds)
        mib = {provider: peak(provider, name, shape, threads) for provider in PROVIDERS}
        found = {"seconds": {provider: asdict(timing) for provider, timing in timings.items()}, "mib": mib}
        rows.append({"name": name, "description": description, "shape": shape, "wrong": problem, **found})
    return rows


def wrong(results: dict[str, list[Tensor]]) -> str | None:
    """Return how the results of the two providers differ, or None."""
    ours, theirs = (results[provider] for provider in PROVIDERS)
    for a, b in zip(ours, theirs, strict=True):
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        if not error <= TOLERANCE * largest:
            return f"results differ by {error:.1e}, and the largest value is {largest:.1e}"
    return None


def _anyattn(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from .. import attention

    return attention(q, k, v)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


PROVIDERS: dict[str, Attend] = {"anyattn": _anyattn, "torch SDPA (math)": _math}


def prepare(provider: str, name: str, shape: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    """Return a call that computes the pass on random arrays of shape (batch, nheads, seqlen, head_dim)."""
    import torch

    attend, generator = PROVIDERS[provider], torch.Generator().manual_seed(0)
    arrays = [torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(7)]
    if provider == "anyattn":
        arrays = [x.contiguous() for x in arrays]  # (batch, seqlen, nheads, head_dim), its layout
    primals, tangents, dout = tuple(arrays[:3]), tuple(arrays[3:6]), arrays[6]
    if name == "forward":
        return lambda: [attend(*primals)]
    if name == "tangent of q":
        return lambda: [*torch.func.jvp(lambda q: attend(q, *primals[1:]), primals[:1], tangents[:1])]
    if name == "tangents":
        return lambda: [*torch.func.jvp(attend, primals, tangents)]
    leaves = [x.requires_grad_() for x in primals]
    out = attend(*leaves)
    if name == "backward":
        return lambda: list(torch.autograd.grad(out, leaves, dout, retain_graph=True))
    first = torch.autograd.grad(out, leaves, dout, create_graph=True)
    return lambda: list(torch.autograd.grad(first, leaves, tangents, retain_graph=True))


def peak(provider: str, name: str, shape: tuple[int, ...], threads: int) -> float:
    """Return the MiB that a pass needs in addition to its inputs and what a forward pass saved, in a new process."""
    command = [sys.executable, "-m", __name__, json.dumps([provider, name, shape, threads])]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def _main() -> None:
    import torch

    provider, name, shape, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    prepare(provider, name, (1, 1, 64, shape[3]))()  # loads libraries and starts threads
    call = prepare(provider, name, tuple(shape))
    before = memory.reset_peak()
    kept = call()
    sys.stdout.write(json.dumps(memory.read_peak() - before))
    del kept


if __name__ == "__main__":
    _main()
