"""Everything that only a machine with a GPU can say: the test matrix on the device, then times. Writes JSON.

    python scripts/gpu.py --json build/gpu.json [--part tests|speed|decode|latency]

Needs torch with a GPU, Triton and NumPy; nothing else. Each part takes some minutes. Times are medians over device
events; every time is measured beside torch's own attention in the same process, and only after the results agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyattn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

DEVICE = "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cuda"
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
WARMUP, ROUNDS = 5, 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append")
    arguments = parser.parse_args()
    if not getattr(torch, DEVICE).is_available():
        sys.stderr.write("torch sees no GPU here\n")
        return 2
    found: dict[str, Any] = {"machine": machine()}
    for part in arguments.part or PARTS:
        start = time.perf_counter()
        found[part] = PARTS[part]()
        found[part]["seconds"] = time.perf_counter() - start
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{part}: {found[part].get('summary', '')} in {found[part]['seconds']:.0f} s", flush=True)
    return 1 if found.get("tests", {}).get("wrong") else 0


def machine() -> dict[str, Any]:
    """What the numbers belong to, with the same run's ceilings."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2**30, device=DEVICE, dtype=torch.uint8)
    other = torch.empty_like(big)
    return {
        "gpu": getattr(torch, DEVICE).get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "matmul_tflops": 2 * 8192**3 / seconds(lambda: a @ b) / 1e12,
        "copy_tb_per_s": 2 * big.numel() / seconds(lambda: other.copy_(big)) / 1e12,
    }


def seconds(call: Callable[[], object]) -> float:
    """Median of ROUNDS."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(ROUNDS):
        begin, end = (getattr(torch, DEVICE).Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        getattr(torch, DEVICE).synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[ROUNDS // 2]


def tests() -> dict[str, Any]:
    """The matrix of cases that the interpreter runs, and the larger ones, forward and backward."""
    from cases import ALL
    from device import compare

    outcomes = {case.name: compare(case, DEVICE) for case in ALL}
    wrong = {name: lines for name, lines in outcomes.items() if lines and lines != ["refused"]}
    refused = [name for name, lines in outcomes.items() if lines == ["refused"]]
    summary = f"{len(ALL) - len(wrong) - len(refused)} agree, {len(wrong)} wrong, {len(refused)} refused"
    return {"summary": summary, "wrong": wrong, "refused": refused}


def speed() -> dict[str, Any]:
    """16k tokens, hidden size 2048, bfloat16."""
    rows = []
    for head_dim in (64, 128, 256):
        for seqlen in (1024, 4096, 16384):
            for causal in (False, True):
                rows.append(_row(head_dim, seqlen, causal))
                print(rows[-1], flush=True)
    return {"rows": rows}


def _row(head_dim: int, seqlen: int, causal: bool) -> dict[str, Any]:
    shape = (16384 // seqlen, seqlen, 2048 // head_dim, head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    flops = 4 * 16384 * seqlen * 2048 * (0.5 if causal else 1)

    def ours() -> torch.Tensor:
        return anyattn.attention(q, k, v, causal=causal)

    def theirs() -> torch.Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)

    row: dict[str, Any] = {"head_dim": head_dim, "seqlen": seqlen, "causal": causal}
    row["difference"] = (ours() - theirs()).abs().max().item()
    row["ours"] = _passes(ours, (q, k, v), dout, flops)
    for name, backend in PEERS.items():
        try:
            with sdpa_kernel(backend):
                row[name] = _passes(theirs, (q, k, v), dout, flops)
        except RuntimeError as error:
            row[name] = {"error": str(error).splitlines()[0]}
    return row


def _passes(call: Callable[[], torch.Tensor], leaves: Any, dout: torch.Tensor, flops: float) -> dict[str, float]:
    with torch.no_grad():
        forward = seconds(call)
    out = call()
    backward = seconds(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    return {"forward_tflops": flops / forward / 1e12, "backward_tflops": 2.5 * flops / backward / 1e12}


def decode() -> dict[str, Any]:
    """One row per sequence, 32 query heads, 8 KV heads, replayed as a CUDA graph."""
    rows = []
    for batch, seqlen in ((1, 4096), (1, 65536), (8, 8192), (32, 8192)):
        q = torch.randn(batch, 1, 32, 128, device=DEVICE, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, seqlen, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        anyattn.attention(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            anyattn.attention(q, k, v)
        spent = seconds(graph.replay)
        size = 2 * k.numel() * 2
        rows.append({"batch": batch, "seqlen": seqlen, "us": spent * 1e6, "tb_per_s": size / spent / 1e12})
    return {"rows": rows}


def latency() -> dict[str, Any]:
    """Of the first call of a variant, and of the Python around a call."""
    x = torch.randn(1, 64, 8, 72, device=DEVICE, dtype=torch.float16)
    start = time.perf_counter()
    anyattn.attention(x, x, x, causal=True)
    getattr(torch, DEVICE).synchronize()
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(1000):
        anyattn.attention(x, x, x, causal=True)
    overhead = (time.perf_counter() - start) / 1000
    getattr(torch, DEVICE).synchronize()
    return {"summary": f"{overhead * 1e6:.1f} us a call", "first_call_s": first, "call_us": overhead * 1e6}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "tests": tests, "speed": speed, "decode": decode, "latency": latency,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
