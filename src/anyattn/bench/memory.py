"""Peak extra memory of a call, each in its own process: `python -m anyattn.bench.memory PROVIDER CASE THREADS`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .inputs import Inputs
from .providers import Provider, Refused, by_name
from .workloads import ITEMSIZE, Workload, from_json

STATUS = Path("/proc/self/status")
LENGTHS = (1024, 2048, 4096, 8192)
MIB = 2.0**20
QUICK = ("anyattn", "torch SDPA", "softmax(QK^T)V")


def workloads() -> list[Workload]:
    """Return forward and forward with backward against length, and the features for which others store a matrix."""
    base = Workload("memory", 1, 8, 4096, 64)
    by_length = [
        replace(base, seqlen_q=n, seqlen_k=n, causal=True, backward=backward, name=f"memory {n}")
        for n in LENGTHS
        for backward in (False, True)
    ]
    return [
        *by_length,
        *(replace(base, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")),
        replace(base, dtype="bfloat16", backward=True),
        replace(base, causal=True, window=(255, 0)),
        replace(base, dropout_p=0.1),
        replace(base, alibi=True),
        replace(base, head_dim_v=32),
        Workload("memory", 1, 32, 1, 128, seqlen_k=32768, nheads_kv=8, cache=True),
    ]


def measure(providers: Iterable[Provider], threads: int, quick: bool = False) -> list[dict[str, Any]]:
    """Return one row per workload: provider -> MiB in addition to inputs and results."""
    chosen = [workload for workload in workloads() if not quick or workload.name == "memory 4096"]
    if quick:
        providers = [provider for provider in providers if provider.name in QUICK]
    rows = []
    for workload in chosen:
        used, refused = {}, {}
        for provider in providers:
            answer = peak(provider.name, workload, threads)
            if isinstance(answer, float):
                used[provider.name] = answer
            elif answer:
                refused[provider.name] = answer
        rows.append(asdict(workload) | {"label": workload.label, "mib": used, "refused": refused})
    return rows


def peak(provider: str, workload: Workload, threads: int) -> float | str | None:
    """Return MiB in addition to inputs and results, or why there is no value; None if the variant does not apply."""
    command = [sys.executable, "-m", __name__, provider, json.dumps(asdict(workload)), str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
    answer = json.loads(result.stdout)
    return float(answer) if isinstance(answer, int | float) else answer


def results_mib(workload: Workload) -> float:
    """Return the MiB of out, of the float32 lse and, for backward, of the gradients."""
    rows = workload.batch * workload.seqlen_q * workload.nheads
    keys = workload.batch * workload.seqlen_k * workload.nheads_kv
    d, dv, size = workload.head_dim, workload.head_dim_v, ITEMSIZE[workload.dtype]
    forward = rows * (dv * size + 4)
    return (forward + (rows * d + keys * (d + dv)) * size * workload.backward) / MIB


def _main() -> None:
    import torch

    name, workload, threads = sys.argv[1], from_json(json.loads(sys.argv[2])), int(sys.argv[3])
    torch.set_num_threads(threads)
    sys.stdout.write(json.dumps(_measured(by_name(name), workload, threads)))


def _measured(provider: Provider, workload: Workload, threads: int) -> float | str | None:
    """Measure after a small call, which loads libraries and starts threads. Masks and layouts of a provider count."""
    try:
        tiny = replace(workload, seqlen_q=min(64, workload.seqlen_q), seqlen_k=64)
        warm = provider.prepare(Inputs(tiny), threads)
        if warm is None:
            return None
        warm.run()
        inputs = Inputs(workload)
        for array in ("q", "k", "v", "dout"):
            inputs.heads_first(array)
        before = reset_peak()
        prepared = provider.prepare(inputs, threads)
        assert prepared is not None
        kept = prepared.run()
        used = read_peak() - before
        del kept
    except (Refused, NotImplementedError) as error:
        return str(error)
    return used - results_mib(workload)


def reset_peak() -> float:
    """Return the resident MiB; reset the peak to this value if Linux allows it."""
    if not STATUS.exists():
        return read_peak()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def read_peak() -> float:
    """Return the peak resident MiB. Except on Linux it may be the parent process's peak, which may be higher."""
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _status(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _main()
