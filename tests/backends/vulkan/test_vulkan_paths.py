"""Paths of computation on a Vulkan device: their choice, their requirements, and their removal after a failure."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import anyattn
from anyattn.backends.vulkan import api, matrices, score_code, selftest, tuning
from anyattn.backends.vulkan import device as devices
from anyattn.backends.vulkan.commands import Commands
from anyattn.backends.vulkan.device import Device
from anyattn.backends.vulkan.device_info import MATRICES, SCALAR, SHUFFLES
from anyattn.backends.vulkan.engine import current_engine
from anyattn.backends.vulkan.matrices import Matrices, Shape
from anyattn.backends.vulkan.memory import Memory
from anyattn.backends.vulkan.pipeline import Pipelines
from anyattn.config import settings
from anyattn.definition.errors import DeviceError, DeviceMemoryError
from anyattn.definition.problem import Problem
from anyattn.runtime import dispatch
from anyattn.testing import Case, make_inputs
from backends.vulkan.common import needs_vulkan

pytestmark = needs_vulkan
X = np.random.default_rng(0).standard_normal((1, 40, 2, 24), np.float32)


@pytest.fixture(autouse=True)
def _untested(fresh_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has passed its test yet."""
    monkeypatch.setattr(selftest, "_results", {})


@pytest.fixture
def shuffling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use four lanes per row as on a GPU, with shuffles if the device has them."""
    original = tuning.forward_config

    def config(info: devices.DeviceInfo, problem: Problem) -> tuning.Config:
        chosen = replace(original(info, problem), lanes=4, shuffle=info.shuffle, matrix=None)
        return replace(chosen, dim=-(-chosen.dim // 4) * 4, dim_v=-(-chosen.dim_v // 4) * 4)

    monkeypatch.setattr(tuning, "forward_config", config)


def results() -> dict[str, str]:
    """path -> why it was left out, of the forward pass in float32."""
    [found] = [paths for (_, direction, dtype), paths in selftest._results.items() if dtype == "float32"]
    return found


def attend(**given: Any) -> None:
    """Right, whatever was left out."""
    want = anyattn.attention(X, X, X, causal=True, backend="numpy")
    assert np.allclose(anyattn.attention(X, X, X, causal=True, **given), want, atol=1e-5)


def test_each_path_runs_its_self_test_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, original = [], selftest._mismatches

    def note(plan: Any, problem: Problem) -> str:
        tried.append(plan.path)
        return original(plan, problem)

    monkeypatch.setattr(selftest, "_mismatches", note)
    for n in (3, 7, 40):
        anyattn.attention(X[:, :n], X, X, backend="vulkan")
    assert tried == [SCALAR] and results() == {SCALAR: ""}


@pytest.mark.usefixtures("shuffling")
def test_path_with_wrong_results_is_disabled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    constants = tuning.Config.constants
    without_softcap = {6: tuning.ALL_FEATURES & ~8}
    monkeypatch.setattr(tuning.Config, "constants", lambda x: constants(x) | (without_softcap if x.shuffle else {}))
    with caplog.at_level(logging.WARNING, "anyattn"):
        attend(backend="vulkan")
    assert results()[SHUFFLES].startswith("out is off by ") and results()[SCALAR] == ""
    assert f"excluding {SHUFFLES}: out is off by " in caplog.text and len(caplog.records) == 1
    assert selftest.failures() == [f"{SHUFFLES}: {results()[SHUFFLES]} (forward, float32)"]


@pytest.mark.usefixtures("shuffling")
@pytest.mark.parametrize("lost", [False, True])
def test_path_that_the_driver_refuses_is_disabled(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """A shader that it cannot compile, or that the device does not survive; another device is opened then."""
    get, first = Pipelines.get, current_engine()

    def refuse(self: Pipelines, name: str, *arguments: Any, **named: Any) -> int:
        if name.endswith("_shuffle"):
            self.device.check(api.LOST if lost else -3, "vkCreateComputePipelines")
        return get(self, name, *arguments, **named)

    monkeypatch.setattr(Pipelines, "get", refuse)
    attend(backend="vulkan")
    assert "vkCreateComputePipelines: " in results()[SHUFFLES] and results()[SCALAR] == ""
    assert (current_engine() is not first) is lost


def test_device_without_a_correct_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_mismatches", lambda plan, problem: "out is off by 3")
    with pytest.raises(anyattn.UnsupportedProblem, match=r"computes wrongly: out is off by 3 \(forward, float32\)"):
        attend(backend="vulkan")
    attend(backend="vulkan,numpy")
    attend()


@pytest.mark.parametrize(("kind", "name", "wrong"), [("_FLOATS", "tanh", "sigmoid"), ("_INTS", "mod", "floor_divide")])
def test_device_that_computes_functions_wrongly_is_refused_for_them(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, wrong: str
) -> None:
    monkeypatch.setitem(getattr(score_code, kind), name, wrong)
    score_code.generate.cache_clear()
    with pytest.raises(anyattn.UnsupportedProblem, match=r"computes wrongly: .* \(forward with functions, float32\)"):
        anyattn.attention(X, X, X, score_mod=lambda score, b, h, q_idx, kv_idx: 2 * np.exp(score), backend="vulkan")
    score_code.generate.cache_clear()
    attend(backend="vulkan")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_warmup_compiles_every_pipeline(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(tuning, "split_keys", lambda info, problem, config: 32)
    x = X.astype(dtype)
    anyattn.warmup(x, x, x, causal=True, backward=True, backend="vulkan")
    create = Mock(side_effect=AssertionError("compiled in a call"))
    monkeypatch.setattr(Pipelines, "_create", create)
    out, lse = anyattn.attention_forward(x, x, x, causal=True, backend="vulkan")
    anyattn.attention_backward(x, x, x, x, out, lse, causal=True, backend="vulkan")


LOSSES = {"lost": "device lost", "full": "no memory for"}


@pytest.fixture(params=sorted(LOSSES))
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that automatic choice takes, and that fails in every call; what it then says."""
    monkeypatch.setattr(dispatch.get("vulkan"), "avoids", lambda problem: [])
    assert anyattn.explain(X, X, X).chosen == "vulkan"
    monkeypatch.setattr(selftest, "_mismatches", lambda plan, problem: "")
    if request.param == "lost":
        monkeypatch.setattr(Commands, "finish", lambda self: self.device.check(api.LOST, "vkQueueSubmit"))
    else:
        out_of_memory = api.VulkanError("vkAllocateMemory: out of memory", api.OUT_OF_DEVICE_MEMORY)
        monkeypatch.setattr(Memory, "_new", Mock(side_effect=out_of_memory))
        current_engine().memory.trim()
    return LOSSES[request.param]


def test_failing_device_that_is_not_named_falls_back_with_a_warning(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The next backend computes this call and later ones, with one line of why."""
    with caplog.at_level(logging.WARNING, "anyattn"):
        for _ in range(2):
            out, lse = anyattn.attention_forward(X, X, X, causal=True)
            grads = anyattn.attention_backward(X, X, X, X, out, lse, causal=True)
    assert [failing in line for line in caplog.messages] == [True, True]  # forward, backward
    want = anyattn.attention_backward(X, X, X, X, out, lse, causal=True, backend="cpu")
    assert np.array_equal(out, anyattn.attention(X, X, X, causal=True, backend="cpu"))
    assert all(np.array_equal(getattr(grads, name), getattr(want, name)) for name in ("dq", "dk", "dv"))


def test_missing_or_old_device_is_reported_as_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, instance = dispatch.get("vulkan"), devices.instance()
    monkeypatch.setattr(instance, "devices", (replace(devices.device().info, api=(1, 0, 3), name="Old"),))
    assert backend.available() == "Old supports Vulkan 1.0.3, but 1.1 is needed"
    monkeypatch.setattr(instance, "devices", ())
    assert backend.available() == "Vulkan is installed, but no driver has a device"


@pytest.mark.parametrize("full", [False, True])
def test_device_that_does_not_open_is_reported_as_a_reason(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    error = DeviceMemoryError("no memory for 4096 bytes") if full else api.VulkanError("vkCreateDevice: (-3)", -3)
    if full:
        monkeypatch.setattr(Memory, "take", Mock(side_effect=error))
    else:
        devices.forget()
        monkeypatch.setattr(Device, "_create", Mock(side_effect=error))
    with pytest.raises(anyattn.UnsupportedProblem, match=re.escape(str(error))):
        attend(backend="vulkan")
    monkeypatch.setattr(dispatch.get("vulkan"), "avoids", lambda problem: [])
    attend()


def test_a_named_device_that_fails_raises(failing: str) -> None:
    with pytest.raises(DeviceError, match=failing):
        attend(backend="vulkan")


def gpu(**changes: Any) -> devices.DeviceInfo:
    """One that is not here."""
    offered = Matrices((Shape(16, 16, 16, "float16"), Shape(16, 8, 8, "float16"), Shape(16, 16, 16, "bfloat16")))
    given = {"kind": "discrete", "subgroup": 32, "shuffle": True, "matrices": offered, "shared_memory": 49152}
    return replace(devices.device().info, **(given | {"invocations": 1024} | changes))


@pytest.mark.parametrize(
    ("case", "path"),
    [
        (Case("long_f16", dtype="float16", seqlen_q=500), MATRICES),
        (Case("long_bf16", dtype="bfloat16", seqlen_q=500), MATRICES),
        (Case("group_f16", dtype="float16", seqlen_q=1, group=8), MATRICES),
        (Case("row_f16", dtype="float16", seqlen_q=1), SHUFFLES),
        (Case("long_f32", seqlen_q=500), SHUFFLES),
    ],
    ids=str,
)
def test_matrices_are_used_only_for_enough_queries(case: Case, path: str) -> None:
    problem, _ = make_inputs(case).describe()
    config = tuning.forward_config(gpu(), problem)
    assert config.path == path
    if path == MATRICES:
        assert config.matrix == Shape(16, 16, 16, case.dtype)
        assert config.tile == config.workgroup // config.subgroup * config.matrix.m
        assert config.keys // config.lanes % 4 == 0
        # rows of one sequence must not depend on how long others are
        few = problem._replace(batch_invariant=True, seqlen_q=1)
        assert tuning.forward_config(gpu(), few).path == path


def test_matrices_stay_within_the_limits_of_a_device() -> None:
    problem, _ = make_inputs(Case("wide", dtype="float16", seqlen_q=500, head_dim=256, head_dim_v=256)).describe()
    sizes = [tuning.forward_config(gpu(shared_memory=kib << 10), problem).workgroup for kib in (48, 28, 22)]
    assert sizes == [128, 64, 32]
    assert tuning.forward_config(gpu(shared_memory=16384), problem).path == SHUFFLES
    assert tuning.forward_config(gpu(invocations=64), problem).workgroup == 64
    assert tuning.forward_config(gpu(subgroup=64), problem).lanes == 4


class Driver:
    """vkGetPhysicalDevice... of a device with some features and shapes."""

    def __init__(self, features: set[str], shapes: list[dict[str, int]]) -> None:
        self.features, self.shapes = features, shapes

    def __call__(self, name: str, *arguments: Any, result: Any = None) -> Any:
        return {
            "vkGetPhysicalDeviceFeatures2": self.get_features,
            "vkGetPhysicalDeviceProperties2": self.get_properties,
            "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR": self.get_shapes,
        }[name]

    def get_features(self, physical: Any, at: int) -> None:
        self._fill(at, 1)

    def get_properties(self, physical: Any, at: int) -> None:
        self._fill(at, 0xFFFF)

    def _fill(self, at: int, value: int) -> None:
        """Sets what is offered in a chain of structures."""
        kinds = (
            *(api.Features2, api.CooperativeMatrixFeatures, api.MemoryModelFeatures, api.Float16Features),
            *(api.SubgroupSizeFeatures, api.Bfloat16Features, api.Properties2, api.SubgroupSizeProperties),
            api.SubgroupProperties,
        )
        by_type = {kind.TYPE: kind for kind in kinds}
        while at:
            one = by_type[api.u32.from_address(at).value].from_address(at)
            for field, _ in one._fields_:
                if f"{type(one).__name__}.{field}" in self.features:
                    setattr(one, field, value)
            at = one.pNext

    def get_shapes(self, physical: Any, count: int, at: int | None) -> int:
        api.u32.from_address(count).value = len(self.shapes)
        for index, shape in enumerate(self.shapes if at else ()):
            size = api.ctypes.sizeof(api.CooperativeMatrixProperties)
            one = api.CooperativeMatrixProperties.from_address(at + index * size)
            assert one.sType == one.TYPE
            for name, value in shape.items():
                setattr(one, name, value)
        return 0


EXTENSIONS = frozenset({matrices.MATRIX, matrices.BFLOAT16})
FEATURES = {"CooperativeMatrixFeatures.matrix", "MemoryModelFeatures.model", "Float16Features.float16"}
FEATURES |= {"SubgroupSizeFeatures.control", "SubgroupSizeFeatures.full"}
FEATURES |= {"Bfloat16Features.type", "Bfloat16Features.matrix"}
FEATURES |= {"SubgroupSizeProperties.stages", "SubgroupProperties.stages", "SubgroupProperties.operations"}
F16, F32, S8, BF16 = 0, 1, 3, 1000141000


def shape(size: int, inputs: int, sums: int, scope: int = 3) -> dict[str, int]:
    return {"m": size, "n": size, "k": size, "a": inputs, "b": inputs, "c": sums, "result": sums, "scope": scope}


SHAPES = [shape(16, F16, F16), shape(16, F16, F32), shape(16, S8, 5), shape(64, F16, F32, 2), shape(8, BF16, F32)]


def query(features: set[str] = FEATURES, extensions: frozenset[str] = EXTENSIONS, minor: int = 3) -> Matrices:
    return matrices.query(Driver(features, SHAPES), None, (1, minor, 0), extensions)


def test_matrix_shapes_are_read_from_the_driver() -> None:
    assert query() == Matrices((Shape(16, 16, 16, "float16"), Shape(8, 8, 8, "bfloat16")))
    only_half = query(FEATURES - {"Bfloat16Features.matrix"})
    assert only_half.shapes == (Shape(16, 16, 16, "float16"),) and only_half.best("bfloat16") is None
    assert query(extensions=EXTENSIONS - {matrices.BFLOAT16}) == only_half
    assert query().best("float16") == Shape(16, 16, 16, "float16")


def test_missing_features_for_matrices_are_named() -> None:
    assert query(extensions=frozenset()).off == "the driver has no VK_KHR_cooperative_matrix"
    assert query(minor=2).off == "Vulkan 1.3 is needed"
    lacking = query(FEATURES - {"MemoryModelFeatures.model", "SubgroupSizeFeatures.full"})
    assert lacking.off == "the driver has no vulkanMemoryModel, computeFullSubgroups"
    for one, what in (
        ("SubgroupSizeProperties.stages", "subgroups of a required size in compute shaders"),
        ("SubgroupProperties.operations", "subgroup shuffles in compute shaders"),
    ):
        assert query(FEATURES - {one}).off == f"the driver has no {what}"
    nothing = query(FEATURES - {"Float16Features.float16", "Bfloat16Features.type"})
    assert nothing.off == "the driver supports no 16-bit matrices of 8, 16 or 32 with float32 sums"
    info = gpu(matrices=nothing)
    assert info.paths()[MATRICES] == nothing.off and f"{MATRICES}: {nothing.off}" in info.describe()["off"]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Return the file that stores compiled pipelines."""
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "cache"))
    settings.reload()
    yield tmp_path / "cache" / f"vulkan-{devices.device().info.cache_key}.bin"
    monkeypatch.undo()
    settings.reload()


def compile_one(monkeypatch: pytest.MonkeyPatch, gives: bytes) -> bytes:
    """Compile one pipeline. Return the initial cache data, and let the driver return `gives` afterwards."""
    given = []
    device = devices.device()

    def create(name: str, info: Any) -> int:
        if name == "vkCreatePipelineCache":
            given.append(api.ctypes.string_at(info.data, info.size))
        return Device.create(device, name, info)

    def get(handle: Any, cache: int, size: int, data: int | None) -> int:
        api.size_t.from_address(size).value = len(gives)
        if data:
            api.ctypes.memmove(data, gives, len(gives))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(device, "create", create)
        made = Pipelines(device, current_engine().layout)
        patch.setattr(made._kept, "_get", get)
        made.get("store_f32", {}, unroll=False)
    return given[0]


def test_compiled_pipelines_are_cached(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    assert compile_one(monkeypatch, b"first") == b""
    assert compile_one(monkeypatch, b"first") == b"first"
    assert compile_one(monkeypatch, b"and more") == b"first"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    kept.write_bytes(kept.read_bytes()[:-1])
    assert compile_one(monkeypatch, b"third") == b""  # what is broken is not shown to the driver
    assert compile_one(monkeypatch, b"third") == b"third"


def test_cache_folder_that_cannot_be_written_is_skipped(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    kept.parent.write_text("a file")
    assert compile_one(monkeypatch, b"first") == compile_one(monkeypatch, b"first") == b""
