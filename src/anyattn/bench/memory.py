"""Peak extra memory of one forward and backward: `python -m anyattn.bench.memory PROVIDER SEQLEN`, a process each."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from .cases import Case
from .providers import providers

STATUS = Path("/proc/self/status")
LENGTHS = (1024, 2048, 4096, 8192)


def peak(provider: str, seqlen: int) -> dict[str, float]:
    """MiB above the inputs, forward and then backward too, at (1, 8, seqlen, 64) float32."""
    command = [sys.executable, "-m", __name__, provider, str(seqlen)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: float(value) for name, value in json.loads(result.stdout).items()}


def _main() -> None:
    import torch

    name, seqlen = sys.argv[1], int(sys.argv[2])
    provider = next(p for p in providers() if p.name == name)
    tiny = Case("warm-up", 1, 8, 64, 64, causal=True, backward=True)
    provider.prepare(tiny)()
    q, k, v, dout = (torch.from_numpy(x) for x in Case("memory", 1, 8, seqlen, 64).arrays())
    for x in (q, k, v):
        x.requires_grad_()
    before = _reset()
    out = provider.attend(q, k, v, True)
    forward = _peak() - before
    out.backward(dout)
    sys.stdout.write(json.dumps({"forward": forward, "backward": _peak() - before}))


def _reset() -> float:
    """MiB resident now; where Linux allows it, the peak starts again from there."""
    if not STATUS.exists():
        return _peak()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    """Peak resident MiB. Elsewhere than on Linux it may be the parent process's, and so too high."""
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _status(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _main()
