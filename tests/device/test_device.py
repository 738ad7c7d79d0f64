"""The checks of `make gpu` in host memory, by Triton's interpreter, and its message without a GPU."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from anyattn.backends.triton.device import INTERPRETER, interpreted
from anyattn.bench import tune_triton
from device.arrays import compare
from device.claims import EVERYWHERE
from harness.backends import skip_module_without
from harness.cases import named
from harness.paths import SCRIPTS
from harness.processes import run_python

skip_module_without("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="Triton compiles here: make gpu runs all of it on the card")


CASES = ["plain", "expanded", "varlen_window_alibi", "paged_varlen", "wide_heads", "int8_of_sequences", "e5m2_expanded"]


@pytest.mark.parametrize("name", CASES)
def test_cases_pass_in_host_memory(name: str) -> None:
    assert compare(named(name), "cpu") == (["refused"] if name == "wide_heads" else [])


@pytest.mark.parametrize("name", EVERYWHERE)
def test_claims_hold_in_host_memory(name: str) -> None:
    EVERYWHERE[name]("cpu")


def test_missing_gpu_is_reported(tmp_path: Path) -> None:
    done = run_python(SCRIPTS / "gpu.py", "--json", tmp_path / "gpu.json", without=("TRITON_INTERPRET",))
    if torch.cuda.is_available():
        return
    assert done.returncode == 2 and done.stderr.startswith("no GPU: torch finds no GPU"), done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("part", ["ceilings", "speed", "decode", "latency", "memory", "training", "peers"])
def test_every_step_runs_on_a_cpu(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every step on tiny problems. The measured numbers have no meaning on a CPU."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS.parent / "examples"))
    import gpu_times

    tiny = gpu_times.Scale(64, 32, (8, 16), (16, 32), ((2, 20),), 2, 1, 1, 16)
    arguments = {"others": {"flash": gpu_times.sdpa(gpu_times.SDPBackend.FLASH_ATTENTION)}} if part == "speed" else {}
    found = getattr(gpu_times, part)("cpu", tiny, **arguments)
    assert found and not found.get("wrong")
    rows = found.get("rows", [])
    assert not [row for row in rows if "error" in row.get("anyattn", {}) or "error" in row.get("flash", {})]
    assert len(rows) == {"speed": 8, "decode": 1}.get(part, 0)


def test_tuned_tiles_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu

    workload = tune_triton.Workload("dq", "float16", 16, 1, 20, 20, nheads_kv=1)
    monkeypatch.setattr(tune_triton, "workloads", lambda _: [workload, workload._replace(dtype="float32")])
    in_use = partial(tune_triton.tiles_in_use, workload, INTERPRETER)
    monkeypatch.setattr(tune_triton, "time_call", lambda call, **_: float(math.prod(in_use())))
    before = in_use()
    (row,) = gpu.tune("cpu")["rows"]
    assert row["workload"] == workload._asdict()
    assert row["tiles"] == (16, 16, 1, 1, 1) and row["before"] == before == in_use()


def test_step_that_raises_is_reported_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu

    found = gpu.run(lambda device: 1 / 0)
    assert "ZeroDivisionError" in found["wrong"]["exception"] and found["summary"] == "broken"
    assert gpu.run(lambda device: {"summary": device})["summary"] == "cuda"
