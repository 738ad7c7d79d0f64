"""AMX: the kernels give the same bits on the processor's tiles, where this machine has them, and on emulated ones."""

from __future__ import annotations

import pytest

from anyattn.backends.cpu import library
from anyattn.runtime import dispatch
from harness.paths import ROOT
from harness.processes import run_python

EMULATED = ROOT / "build" / "emulated" / "libanyattn.so"  # built by `make test-emulated`

PROGRAM = """
import hashlib
import sys
from dataclasses import replace

from anyattn.testing import PASSES, Case, make_inputs
from harness.backends import Engine
from harness.checks import run

CASE = Case("amx", dtype="bfloat16", batch=1, seqlen_q=150, seqlen_k=170, nheads_kv=2, group=2, head_dim=64, dlse=True)
CASES = [
    CASE,
    replace(CASE, causal=True),
    replace(CASE, head_dim=40, head_dim_v=24, softcap=3.0),
    replace(CASE, bias="full"),
    replace(CASE, head_dim=200, head_dim_v=136),
    replace(CASE, dropout_p=0.3),
    replace(CASE, seqlen_q=700, causal=True),
]
for case in CASES:
    for direction in PASSES:
        engine = Engine("cpu", sys.argv[1])
        engine.use(2)
        results = run(make_inputs(case), direction, engine)
        arrays = [results[name].tobytes() for name in sorted(results) if results[name] is not None]
        print(case.head_dim, direction, hashlib.sha256(b"".join(arrays)).hexdigest())
"""


def digests(target: str, **variables: str) -> list[str]:
    """Return one line for each case and pass, computed by an instruction set in a fresh process."""
    finished = run_python("-c", PROGRAM, target, **variables)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def emulated_target() -> str:
    """Return the fastest emulation that this machine runs."""
    code = "from anyattn.backends.cpu import library; print(library.load().targets()[0])"
    return run_python("-c", code, ANYATTN_LIBRARY=str(EMULATED)).stdout.strip()


def test_amx_hardware_and_emulation_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYATTN_LIBRARY", raising=False)
    if "cpu" not in dispatch.available() or not EMULATED.exists():
        pytest.skip("`make test-emulated` has not built the emulation")
    hardware = run_python("-c", "from anyattn.backends.cpu import library; print(library.load().targets())").stdout
    if "avx512amx" not in hardware:
        reasons = library.load().target_reasons("bfloat16")
        pytest.skip(f"this machine runs no AMX: {reasons.get('avx512amx', 'not compiled in')}")
    assert digests("avx512amx") == digests(emulated_target(), ANYATTN_LIBRARY=str(EMULATED))


def test_emulation_gives_the_same_bits_in_every_process() -> None:
    if not EMULATED.exists():
        pytest.skip("`make test-emulated` has not built the emulation")
    lines = digests(emulated_target(), ANYATTN_LIBRARY=str(EMULATED))
    assert len(set(lines)) == len(lines) == 14
    assert digests(emulated_target(), ANYATTN_LIBRARY=str(EMULATED)) == lines
