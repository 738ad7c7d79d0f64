"""Launches through Triton's own launchers: the kernels, addresses, streams and devices that the driver receives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness.backends import skip_module_without
from harness.paths import TESTS
from harness.processes import run_python

pytest.importorskip("triton.backends.nvidia", reason="no Triton here, and ANYATTN_REQUIRE does not ask for it")
skip_module_without("triton")


@pytest.fixture(scope="module", params=["nvidia", "amd"])
def vendor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def recorded(vendor: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the launches by scenario, compiled in a new process without the interpreter."""
    cache = str(tmp_path_factory.mktemp("triton"))
    done = run_python(TESTS / "backends" / "emulators" / "fake_gpu.py", vendor, TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kernels(found: Any) -> list[str]:
    return [launch["kernel"] for launch in found["launches"]]


def addresses(launch: Any) -> list[int]:
    return [value for kind, value in launch["arguments"] if kind.startswith("*")]


def test_arguments_are_passed_at_the_positions_of_the_kernel(recorded: Any) -> None:
    found = recorded["alignment"]
    first, *_, last = found["launches"]
    assert len(found["launches"]) == 4 and first["grid"] == [128, 1, 1]
    assert addresses(last) == found["pointers"]
    assert ["fp32", 0.125] in last["arguments"] and ["i32", 8 * 1024 * 64] in last["arguments"]


def test_equal_plans_share_a_loaded_kernel(recorded: Any) -> None:
    """Check that the plan loads its kernel, and that only an unaligned address loads another one."""
    assert recorded["alignment"]["loads"] == [0, 1]


def test_launches_use_the_current_stream_of_the_tensors_device(recorded: Any) -> None:
    found = recorded["streams"]
    where = [(launch["device"], launch["stream"]) for launch in found["launches"]]
    assert where == [(0, 77), (1, 1077), (0, 88), (1, 1088)]
    assert found["current"] == 0, "the current device is as before"


def test_a_backward_runs_in_order_in_its_workspace(recorded: Any) -> None:
    found = recorded["training"]
    parts = ("delta", "dkv", "dq", "dsink")
    assert kernels(found) == [f"attention_backward_{part}" for part in parts]
    pointers = found["pointers"]
    for launch in found["launches"]:
        assert pointers["workspace"] in addresses(launch), "delta lies there"
    results = [{pointers[f"d{name}"] for name in names} for names in ("", "kv", "q", ("sink",))]
    assert all(wanted <= set(addresses(launch)) for wanted, launch in zip(results, found["launches"], strict=True))


def test_functions_are_constants_and_captured_arrays_are_arguments(recorded: Any) -> None:
    found = recorded["functions"]
    tiles, forward, *backward = found["launches"]
    names = ("backward_delta", "backward_dkv", "backward_dq")
    assert kernels(found)[:5] == ["attention_mask_tiles", *(f"attention_{name}" for name in ("forward", *names))]
    sums = ["clear_dcaptured", "attention_backward_dcaptured", "attention_backward_dcaptured", "finish_dcaptured"]
    assert kernels(found)[5:] == sums
    first, second = found["pointers"]
    assert all({first["captured_indices"], first["workspace"]} <= set(addresses(one)) for one in (tiles, forward))
    assert all(second["captured"] in addresses(one) for one in (*backward[1:3], *backward[4:6]))
    assert second["dcaptured"] in addresses(backward[-1])


def test_decoding_splits_the_keys_and_combines(recorded: Any) -> None:
    found = recorded["decoding"]
    assert kernels(found) == ["attention_forward", "combine_splits"]
    forward, combine = found["launches"]
    pointers, splits = found["pointers"], forward["grid"][1]
    assert splits > 1
    part_lse = pointers["workspace"] + 4 * splits * 2 * 8 * 64  # after the parts of out
    assert {pointers["workspace"], part_lse} <= set(addresses(forward)) & set(addresses(combine))
    assert {pointers["out"], pointers["lse"]} <= set(addresses(combine)) - set(addresses(forward))


def test_an_append_runs_on_the_caches_device(recorded: Any) -> None:
    found = recorded["append"]
    assert kernels(found) == ["copy_rows"] * 3  # k, v and the rotated q
    assert {launch["device"] for launch in found["launches"]} == {1}


@pytest.mark.parametrize("scenario", ["training", "functions", "decoding", "append"])
def test_calls_can_be_captured_in_a_graph(recorded: Any, scenario: str) -> None:
    """No operator of torch runs: nothing is allocated, copied or read back."""
    assert recorded[scenario]["launches"] and recorded[scenario]["operators"] == []


def test_float32_follows_the_precision_setting_of_torch(vendor: str, recorded: Any) -> None:
    """Check that TF32 loads another kernel, which only NVIDIA has."""
    assert recorded["precision"]["loaded"] == [0, int(vendor == "nvidia"), 0]


def test_a_kernel_that_does_not_compile_is_named(vendor: str, recorded: Any) -> None:
    error, nvidia = recorded["refusal"]["error"], vendor == "nvidia"
    for part in (
        "attention_forward(HEAD_DIM=128,",
        "num_warps=8" if nvidia else "num_warps=4",
        "of k, lse, out, q, v",
        "cuda 90" if nvidia else "hip gfx942",
        "out of registers",
    ):
        assert part in error, error


def test_divisor_divides_every_stride() -> None:
    from anyattn.backends.triton.launch import Address, Template, stride

    for steps, divisor in (((64, 4096), 16), ((40, 320), 8), ((100, 800), 4), ((0, 7), 1), ((), 16)):
        template = Template((Address("q", "float16"), *map(stride, steps)), {})
        assert template.divisor == divisor
