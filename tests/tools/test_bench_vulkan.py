"""The benchmark's Vulkan providers: what they measure, what they refuse, and how an absent one is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

from anyattn.bench import gate, providers, run, suites
from anyattn.bench.inputs import Inputs
from anyattn.bench.providers import Refused
from anyattn.bench.workloads import Workload

OURS, AULE = (providers.by_name(name) for name in ("anyattn Vulkan", "aule-attention Vulkan"))
CASE = Workload("vulkan", 1, 2, 24, 16, suite="vulkan")


def test_missing_peer_is_reported_with_its_installation() -> None:
    assert AULE.absent() in (None, "not installed: pip install aule-attention==0.5.0")


@pytest.mark.parametrize("provider", [OURS, AULE], ids=lambda provider: provider.name)
def test_other_suites_do_not_run_vulkan(provider: providers.Provider) -> None:
    assert provider.prepare(Inputs(replace(CASE, suite="bars")), 1) is None


@pytest.mark.skipif(OURS.absent() is not None, reason="no Vulkan device: .ci/run requires one")
@pytest.mark.parametrize("workload", [replace(CASE, causal=True), replace(CASE, backward=True, nheads_kv=1)], ids=str)
def test_anyattn_passes_the_gate_on_the_device(workload: Workload) -> None:
    inputs = Inputs(workload)
    prepared = OURS.prepare(inputs, 1)
    assert prepared is not None and run.check(gate.Gate(inputs), prepared) is None


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({"dtype": "float16"}, "no float16"),
        ({"causal": True, "seqlen_k": 40}, "no causal mask from the bottom right"),
        ({"softcap": 5.0}, "no softcap"),
        ({"head_dim_v": 128}, "no head_dim above 64"),
        ({"backward": True, "nheads_kv": 1}, "no backward with grouped heads"),
    ],
)
def test_unsupported_workloads_of_aule_are_refused(features: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        AULE.prepare(Inputs(replace(CASE, **features)), 1)


def test_the_suite_is_small_enough_for_a_software_driver() -> None:
    workloads = suites.select(["vulkan"])
    assert {workload.backward for workload in workloads} == {False, True}
    assert max(workload.flops for workload in workloads) < 5e9
