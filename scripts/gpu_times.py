"""Times on a GPU compared with torch's kernels, in one process and alternating, after a comparison with float64.

Each part is a function of the device's name that returns findings with a summary. `Scale` makes them small for tests.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyattn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

Found = dict[str, Any]
Call = Callable[[], Any]
Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the workloads, and numbers of repetitions."""

    tokens: int = 16384
    width: int = 2048
    head_dims: tuple[int, ...] = (64, 128, 256)
    seqlens: tuple[int, ...] = (1024, 4096, 16384)
    caches: tuple[tuple[int, int], ...] = ((1, 4096), (1, 65536), (8, 8192), (32, 8192))  # sequences, keys of each
    calls: int = 1000
    layers: int = 8
    rounds: int = 25
    ceiling: int = 8192


FULL = Scale()
ERROR = 2e-2  # accepted error of unit normal values in bfloat16
CHECKED_ROWS = 128


def seconds(call: Call, device: str, rounds: int) -> float:
    """Return the median time of single calls, by the clock of the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if device == "cpu":
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings(device: str, scale: Scale = FULL) -> Found:
    """Measure the speed of a matrix product and of a copy on the card."""
    n = scale.ceiling
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(16 * n * n, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * n**3 / seconds(lambda: a @ b, device, scale.rounds) / 1e12,
        "copy_tb_per_s": 2 * source.numel() / seconds(lambda: target.copy_(source), device, scale.rounds) / 1e12,
    }


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out: Tensor = anyattn.attention(q, k, v, causal=causal)
    return out


def sdpa(backend: SDPBackend) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            heads = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)

    return call


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute flex_attention, compiled per shape, because beyond Inductor's cache limit all scores are stored."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    key = (q.shape, causal)
    if key not in _compiled:
        torch._dynamo.reset()
        _compiled.clear()
        mask = create_block_mask(_seen, None, None, *[q.shape[1]] * 2, device=q.device.type) if causal else None
        _compiled[key] = torch.compile(partial(flex_attention, block_mask=mask), dynamic=False)
    out: Tensor = _compiled[key](*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


def _seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


_compiled: dict[Any, Any] = {}
TORCHS: dict[str, Attention] = {
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION), "flex": flex,
}  # fmt: skip


def speed(device: str, scale: Scale = FULL, others: dict[str, Attention] = TORCHS) -> Found:
    """Measure forward and backward in bfloat16, with constant tokens and width for every length and head size."""
    rows = []
    for head_dim in scale.head_dims:
        for seqlen in scale.seqlens:
            for causal in (False, True):
                shape = (scale.tokens // seqlen, seqlen, scale.width // head_dim, head_dim)
                rows.append(_row(shape, causal, {"anyattn": ours, **others}, device, scale))
                print(rows[-1], flush=True)
    wrong = {str(row["shape"]): row["anyattn"]["error"] for row in rows if "error" in row["anyattn"]}
    return {"summary": f"{len(rows)} rows", "rows": rows, "wrong": wrong}


def _row(
    shape: tuple[int, int, int, int], causal: bool, providers: dict[str, Attention], device: str, scale: Scale
) -> Found:
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    batch, seqlen, nheads, head_dim = shape
    flops = 4 * batch * seqlen * seqlen * nheads * head_dim * (0.5 if causal else 1)
    row: Found = {"shape": shape, "causal": causal}
    for name, attention in providers.items():
        try:
            row[name] = _passes(attention, (q, k, v), dout, causal, flops, device, scale)
        except (RuntimeError, AssertionError) as error:
            row[name] = {"error": (str(error) or type(error).__name__).splitlines()[0]}
    return row


def _passes(
    attention: Attention,
    inputs: tuple[Tensor, ...],
    dout: Tensor,
    causal: bool,
    flops: float,
    device: str,
    scale: Scale,
) -> Found:
    with torch.no_grad():
        _check(attention(*inputs, causal), *inputs, causal)
        forward = seconds(lambda: attention(*inputs, causal), device, scale.rounds)
    out = attention(*inputs, causal)
    backward = seconds(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), device, scale.rounds)
    return {"forward_tflops": flops / forward / 1e12, "backward_tflops": 2.5 * flops / backward / 1e12}


def _check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Compare the last queries of the last head with float64."""
    rows = min(CHECKED_ROWS, q.shape[1])
    q64, k64, v64 = q[-1, -rows:, -1].double(), k[-1, :, -1].double(), v[-1, :, -1].double()
    scores = q64 @ k64.T * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + scores.shape[1] - rows)
        scores = scores.masked_fill(hidden, float("-inf"))
    error = float((scores.softmax(-1) @ v64 - out[-1, -rows:, -1].double()).abs().max())
    assert error < ERROR, f"differs from float64 by {error:.1e}"


def decode(device: str, scale: Scale = FULL) -> Found:
    """Measure one query per sequence, 32 query heads and 8 KV heads of 128, bfloat16, with and without a CUDA graph."""
    rows = []
    for batch, seqlen in scale.caches:
        q = torch.randn(batch, 1, 32, 128, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, seqlen, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
        size = 2 * k.numel() * k.element_size()

        def call(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return ours(q, k, v, True)

        replayed = seconds(captured(call, device), device, scale.rounds)
        eager = seconds(call, device, scale.rounds)
        where = {"batch": batch, "seqlen": seqlen}
        rows.append({**where, "us": replayed * 1e6, "eager_us": eager * 1e6, "tb_per_s": size / replayed / 1e12})
        print(rows[-1], flush=True)
    return {"summary": f"{rows[-1]['tb_per_s']:.2f} TB/s", "rows": rows}


def captured(call: Call, device: str) -> Call:
    """Return the replay of the call as a graph; on a CPU, the call itself."""
    if device == "cpu":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def latency(device: str, scale: Scale = FULL) -> Found:
    """Measure the first call of a variant (compiled unless Triton's cache has it) and the Python overhead of a call."""
    x = torch.randn(1, 64, 8, 72, device=device, dtype=torch.float16)
    heads = x.transpose(1, 2)
    start = time.perf_counter()
    ours(x, x, x, True)
    _wait(device)
    found = {"first_call_s": time.perf_counter() - start}
    calls: dict[str, Call] = {
        "anyattn": lambda: ours(x, x, x, True),
        "torch": lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
    }
    for name, call in calls.items():
        call()
        _wait(device)
        start = time.perf_counter()
        for _ in range(scale.calls):
            call()
        found[f"{name}_us"] = (time.perf_counter() - start) / scale.calls * 1e6
        _wait(device)
    return {"summary": f"{found['anyattn_us']:.1f} us a call, torch {found['torch_us']:.1f} us", **found}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def memory(device: str, scale: Scale = FULL) -> Found:
    """Measure the peak MiB of forward and backward in addition to their inputs, which must grow linearly."""
    found = {}
    for seqlen in scale.seqlens:
        q = torch.randn(1, seqlen, 8, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        before = _allocated(device, reset=True)
        ours(q, q, q, True).sum().backward()
        found[seqlen] = (_allocated(device) - before) / 2**20
    first, last = (found[seqlen] / seqlen for seqlen in (scale.seqlens[0], scale.seqlens[-1]))
    wrong = {"growth": f"{found}: more than linear"} if last > 1.2 * first else {}
    return {"summary": f"{found[scale.seqlens[-1]]:.0f} MiB", "mib": found, "wrong": wrong}


def _allocated(device: str, *, reset: bool = False) -> int:
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def training(device: str, scale: Scale = FULL) -> Found:
    """Measure steps of the example's GPT under autocast, with anyattn and with torch's attention: times and losses."""
    from gpt import GPT, Config, anyattn_attention, torch_attention

    head_dim = scale.head_dims[0]
    nheads = max(2, scale.width // 2 // head_dim)
    config = Config(4096, max(scale.seqlens[0], 8), scale.layers, nheads * head_dim, nheads, nheads // 2, head_dim)
    tokens = torch.randint(config.vocab_size, (scale.tokens // config.context, config.context), device=device)
    found: Found = {}
    for name, attention in (("anyattn", anyattn_attention), ("torch", torch_attention)):
        torch.manual_seed(0)
        model = GPT(config, attention).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def step(model: Any = model, optimizer: Any = optimizer) -> float:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model.loss(tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        losses = [step() for _ in range(5)]
        found[name] = {"losses": losses, "step_s": seconds(step, device, max(1, scale.rounds // 5))}
    apart = max(abs(a - b) for a, b in zip(*(found[name]["losses"] for name in found), strict=True))
    wrong = {"losses": f"{apart} apart"} if apart > 0.05 else {}
    steps = ", ".join(f"{name} {found[name]['step_s'] * 1e3:.1f} ms" for name in found)
    return {"summary": f"a step: {steps}", **found, "wrong": wrong}


def peers(device: str, scale: Scale = FULL) -> Found:
    """Measure other installed packages on the workloads of `speed`."""
    found: Found = {}
    others: dict[str, Attention] = {}
    for name, (module, function, heads_first) in PEERS.items():
        try:
            others[name] = _peer(getattr(importlib.import_module(module), function), heads_first)
        except (ImportError, AttributeError, OSError) as error:
            found[name] = f"not installed: {error}"
    rows = speed(device, scale, others)["rows"] if others else []
    return {"summary": ", ".join(others) or "none is installed", **found, "rows": rows}


def _peer(function: Callable[..., Any], heads_first: bool) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if heads_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = function(q, k, v, causal=causal)
        return out.transpose(1, 2) if heads_first else out

    return call


PEERS = {  # module, function, heads come before queries
    "flash-attn-triton": ("flash_attn_triton", "flash_attn_func", False),
    "aule-attention": ("aule", "flash_attention", True),
    "flash-attn": ("flash_attn", "flash_attn_func", False),
}
PARTS: dict[str, Callable[[str], Found]] = {
    "speed": speed, "decode": decode, "latency": latency, "memory": memory, "training": training, "peers": peers,
}  # fmt: skip
