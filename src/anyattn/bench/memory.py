"""Peak extra memory of one forward and backward: `python -m anyattn.bench.memory PROVIDER SEQLEN`, a process each."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from .cases import Case
from .providers import providers

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
    before = _peak_mib()
    out = provider.attend(q, k, v, True)
    forward = _peak_mib() - before
    out.backward(dout)
    sys.stdout.write(json.dumps({"forward": forward, "backward": _peak_mib() - before}))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    _main()
