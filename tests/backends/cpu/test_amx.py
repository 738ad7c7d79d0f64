"""AMX: the kernels give the same bits on the processor's tiles, where this machine has them, and on emulated ones.

Sums of products of parts (float32, float16) have at most the errors of float32 multiplication.
"""

from __future__ import annotations

import json

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
    replace(CASE, dtype="float32"),
    replace(CASE, dtype="float16", head_dim=40, head_dim_v=24, dropout_p=0.3),
    replace(CASE, dtype="float32", causal=True, head_dim=200, head_dim_v=136, bias="full"),
]
for case in CASES:
    for direction in PASSES:
        engine = Engine("cpu", sys.argv[1])
        engine.use(2)
        results = run(make_inputs(case), direction, engine)
        arrays = [results[name].tobytes() for name in sorted(results) if results[name] is not None]
        print(case.dtype, case.head_dim, direction, hashlib.sha256(b"".join(arrays)).hexdigest())
"""


def digests(target: str, **variables: str) -> list[str]:
    """Return one line for each case and pass, computed by an instruction set in a fresh process."""
    finished = run_python("-c", PROGRAM, target, **variables)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def targets(path: str) -> list[str]:
    """Return the instruction sets of a library that this machine runs; "": the installed library."""
    code = "from anyattn.backends.cpu import library; print(*library.load().targets())"
    finished = run_python("-c", code, ANYATTN_LIBRARY=path)
    assert finished.returncode == 0, finished.stderr  # for example, the emulation is of another version
    return finished.stdout.split()


def emulated_target() -> str:
    """Return the fastest emulation that this machine runs."""
    return targets(str(EMULATED))[0]


def test_amx_hardware_and_emulation_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYATTN_LIBRARY", raising=False)
    if "cpu" not in dispatch.available() or not EMULATED.exists():
        pytest.skip("`make test-emulated` has not built the emulation")
    if "avx512amx" not in targets(""):
        reasons = library.load().target_reasons("bfloat16")
        pytest.skip(f"this machine runs no AMX: {reasons.get('avx512amx', 'not compiled in')}")
    assert digests("avx512amx") == digests(emulated_target(), ANYATTN_LIBRARY=str(EMULATED))


def test_emulation_gives_the_same_bits_in_every_process() -> None:
    if not EMULATED.exists():
        pytest.skip("`make test-emulated` has not built the emulation")
    lines = digests(emulated_target(), ANYATTN_LIBRARY=str(EMULATED))
    assert len(set(lines)) == len(lines) == 20
    assert digests(emulated_target(), ANYATTN_LIBRARY=str(EMULATED)) == lines


# Kinds of inputs: factors of q and k and of v, offsets of k and of v. Large factors give large scores, small ones
# denormal parts, and common offsets give sums that are much larger than their differences.
KINDS = {
    "normal": (1.0, 1.0, 0.0, 0.0),
    "times ten": (10.0, 1.0, 0.0, 0.0),
    "times hundred": (100.0, 1.0, 0.0, 0.0),
    "offsets": (1.0, 1.0, 30.0, 30.0),
    "offset values": (1.0, 1.0, 0.0, 300.0),
    "tiny": (1e-18, 1e-18, 0.0, 0.0),
}

ERRORS = """
import json
import sys

import numpy as np

from anyattn import attention_backward, attention_forward
from anyattn.testing import expected_results

head_dim, kinds = int(sys.argv[1]), json.loads(sys.argv[2])
for kind, (factor, factor_v, offset_k, offset_v) in kinds.items():
    sums = {name: np.zeros(2) for name in ("out", "dq", "dk", "dv")}  # squares of errors and of values
    for seed in range(5):
        rng = np.random.default_rng(seed)
        q, k, v, dout = (rng.standard_normal((1, 160, 4, head_dim)) for _ in range(4))
        q, k, v = q * factor, k * factor + offset_k, v * factor_v + offset_v
        q, k, v, dout = (x.astype(np.float32) for x in (q, k, v, dout))
        out, lse = attention_forward(q, k, v, backend="cpu")
        gradients = attention_backward(dout, q, k, v, out, lse, backend="cpu")
        found = {"out": out, "dq": gradients.dq, "dk": gradients.dk, "dv": gradients.dv}
        inputs = {"q": q, "k": k, "v": v}
        expected = expected_results(inputs, None) | expected_results(inputs, dout)
        for name in sums:
            error = found[name].astype(np.float64) - expected[name].value
            sums[name] += (error**2).sum(), (expected[name].value ** 2).sum()
    print(json.dumps({"kind": kind} | {name: float((x[0] / x[1]) ** 0.5) for name, x in sums.items()}))
"""


def errors(head_dim: int, **variables: str) -> dict[tuple[str, str], float]:
    """Return the relative error of each result for each kind of inputs."""
    finished = run_python("-c", ERRORS, str(head_dim), json.dumps(KINDS), **variables)
    assert finished.returncode == 0, finished.stderr
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    return {(row["kind"], name): row[name] for row in rows for name in ("out", "dq", "dk", "dv")}


@pytest.mark.parametrize("head_dim", [40, 128])
def test_parts_are_as_accurate_as_float32_multiplication(head_dim: int) -> None:
    """Compare the errors with those of the fastest instruction set without tiles: 1.5 times are accepted."""
    if not EMULATED.exists():
        pytest.skip("`make test-emulated` has not built the emulation")
    split = errors(head_dim, ANYATTN_LIBRARY=str(EMULATED), ANYATTN_CPU_TARGET=emulated_target())
    without_tiles = next(name for name in targets("") if "amx" not in name)
    plain = errors(head_dim, ANYATTN_LIBRARY="", ANYATTN_CPU_TARGET=without_tiles)
    assert split.keys() == plain.keys()
    assert {what: (split[what], plain[what]) for what in split if split[what] > 1.5 * plain[what]} == {}
