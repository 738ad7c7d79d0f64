"""Cases and checks that the modules of this folder share, child processes included."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from anyattn import testing
from anyattn.backends.vulkan import selftest
from anyattn.backends.vulkan.engine import current_engine
from anyattn.definition.passes import BACKWARD, FORWARD
from anyattn.testing import Case, CaseInputs, make_inputs
from harness.backends import Engine, engines
from harness.cases import named
from harness.checks import run, wrong
from harness.paths import ROOT, python_path
from harness.processes import run_python

VULKAN = Engine("vulkan")
DRIVERS = ROOT / "build" / "drivers"
needs_vulkan = pytest.mark.skipif(VULKAN not in engines(), reason="no Vulkan device: .ci/run requires one")
fresh_plans = pytest.mark.usefixtures("fresh_plans")

_SMALL = {"seqlen_q": 40, "seqlen_k": 60, "batch": 2}
FORWARD_CASES = [
    Case("plain_f32", seqlen_q=33, seqlen_k=70, head_dim=64, head_dim_v=40, group=2, causal=True),
    replace(named("everything"), name="features_f32", **_SMALL),
    replace(named("everything_bf16"), name="features_bf16", **_SMALL),
    Case("paged_f16", lengths="paged", dtype="float16", head_dim=128, head_dim_v=128, seqlen_q=5, page_size=3),
]
# Sums over every axis of a bias; several tiles of rows and of keys; all features; sequences of different lengths.
BACKWARD_CASES = [
    Case("plain_f32", seqlen_q=33, seqlen_k=70, head_dim=64, head_dim_v=40, group=2, causal=True, sink=True, dlse=True),
    replace(named("everything"), name="features_f32", **_SMALL),
    replace(named("everything_bf16"), name="features_bf16", **_SMALL),
    Case("bias_of_all_f16", bias="one", dtype="float16", head_dim=128, head_dim_v=24, **_SMALL),
    Case("bias_of_rows", bias="column", lengths="both", **_SMALL),
    Case("bias_of_keys", bias="row", group=2, **_SMALL),
    Case("packed_f16", lengths="varlen_seqused", dtype="float16", causal=True, batch=3, seqlen_q=40, seqlen_k=40),
]


def check_forward(case: Case) -> None:
    """Compare the outputs with float64."""
    assert not wrong(make_inputs(case), "forward", VULKAN)


def check_backward(case: Case) -> None:
    """Compare the gradients with float64."""
    assert not wrong(make_inputs(case), "backward", VULKAN)


def checked_gradients(inputs: CaseInputs) -> dict[str, Any]:
    """Return the gradients, compared with float64."""
    got = run(inputs, "backward", VULKAN)
    assert not testing.compare(testing.expected(inputs, "backward"), got)
    return got


def printed(code: str, **variables: str) -> str:
    """Return what a new process prints that need not find any backend."""
    result = run_python("-c", code, **{"ANYATTN_REQUIRE": "", **variables})
    assert result.returncode == 0, result.stderr
    return result.stdout


def started(driver: str, *arguments: str, **variables: str) -> str:
    """Return what Python prints under this driver, which `make vulkan-drivers` has unpacked."""
    if not (DRIVERS / driver).exists():
        pytest.skip(f"NOT TESTED: Vulkan on {driver}: `make vulkan-drivers` installs it")
    # of pytest-xdist, which does not run inside
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"ANYATTN_REQUIRE": "vulkan", "ANYATTN_VULKAN_SOFTWARE": "1", "PYTHONPATH": python_path()}
    environment |= variables
    command = [DRIVERS / driver, sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def pass_self_tests() -> None:
    """Let every way to compute pass its test, before a test sets limits that are too small for that problem."""
    for pass_ in (FORWARD, BACKWARD):
        for dtype in ("float32", "float16"):
            selftest.usable(current_engine(), pass_, dtype)
