"""Tests of the Vulkan backend alone: device, memory, submissions, kernel configurations and failures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.backends.vulkan import api, forward, tuning
from anyattn.backends.vulkan import device as devices
from anyattn.backends.vulkan.engine import Job
from anyattn.backends.vulkan.engine import current_engine as engine
from anyattn.config import settings
from anyattn.runtime import dispatch
from anyattn.testing import Case, make_inputs
from backends.vulkan.common import FORWARD_CASES, check_forward, fresh_plans, needs_vulkan, pass_self_tests, printed
from harness.cases import named

pytestmark = [needs_vulkan, fresh_plans]


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"lanes": 4, "rows": 1, "shuffle": True},
        {"lanes": 8, "rows": 2, "shuffle": True},
        {"lanes": 4, "rows": 2, "shuffle": False},
        {"lanes": 2, "rows": 1, "workgroup": 64, "keys": 8, "shuffle": False},
    ],
    ids=lambda shape: "-".join(f"{name}{int(value)}" for name, value in shape.items()),
)
def test_results_do_not_depend_on_the_kernel_configuration(
    monkeypatch: pytest.MonkeyPatch, case: Case, shape: dict[str, Any]
) -> None:
    """Use configurations of GPUs, which a software driver does not choose: several lanes per row, shuffles."""
    original = tuning.forward_config

    def config(info: devices.DeviceInfo, problem: Any) -> tuning.Config:
        chosen = replace(original(info, problem), features=tuning.feature_bits(problem), **shape)
        dims = [-(-tuning.vectors(x) // chosen.lanes) * chosen.lanes for x in (problem.head_dim, problem.head_dim_v)]
        return replace(chosen, dim=dims[0], dim_v=dims[1])

    monkeypatch.setattr(tuning, "forward_config", config)
    check_forward(case)


def test_unrolled_loops_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tuning.forward_config
    monkeypatch.setattr(
        tuning, "forward_config", lambda *x: replace(original(*x), dim=2, dim_v=1, features=0, unroll=True)
    )
    check_forward(Case("unrolled", head_dim=7, head_dim_v=3))


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
@pytest.mark.parametrize("keys", [8, 24])
def test_splitting_the_keys_does_not_change_results(monkeypatch: pytest.MonkeyPatch, case: Case, keys: int) -> None:
    monkeypatch.setattr(tuning, "split_keys", lambda info, problem, config: keys)
    check_forward(case)


def test_gpu_configuration_uses_shuffles_and_splits() -> None:
    """The choice itself, on the description of a device that is not here."""
    gpu = replace(devices.device().info, kind="discrete", subgroup=32, shuffle=True)
    problem, _ = make_inputs(named("decode_f16")).describe()
    config = tuning.forward_config(gpu, problem)
    assert config.shuffle and config.lanes > 1 and config.unroll
    assert tuning.split_keys(gpu, problem, config) < problem.seqlen_k
    assert tuning.split_keys(gpu, problem._replace(batch_invariant=True), config) >= problem.seqlen_k


def test_long_keys_are_split_below_the_loop_limit_of_a_software_driver() -> None:
    """Mesa's leaves loops silently after 65,535: 40,000 keys are more than one workgroup may take."""
    inputs = make_inputs(Case("long", batch=1, seqlen_q=3, seqlen_k=40_000, nheads_kv=1, head_dim=8, head_dim_v=8))
    problem, _ = inputs.describe()
    assert forward.Setup.of(devices.device().info, problem).splits > 1
    check_forward(inputs.case)


@pytest.mark.parametrize("limit", [30_000, 18_000])
def test_arrays_larger_than_a_binding_are_bound_in_blocks(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Parts of the heads, and of one head's sequences, are bound in turn."""
    pass_self_tests()
    info = replace(devices.device().info, storage_range=limit)
    monkeypatch.setattr(engine().device, "info", info)
    case = Case("parts", batch=3, seqlen_q=17, seqlen_k=21, nheads_kv=4, group=2, bias="b1", mask="h1", alibi="bh")
    problem, _ = make_inputs(case).describe()
    assert len(forward.Setup.of(info, problem).launches) > 1
    check_forward(case)


def test_array_that_exceeds_every_binding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pass_self_tests()
    monkeypatch.setattr(engine().device, "info", replace(devices.device().info, storage_range=1000))
    with pytest.raises(anyattn.UnsupportedProblem, match=r"larger than a binding of .*: 1000 bytes"):
        check_forward(named("plain"))


def test_work_is_split_into_short_submissions_on_a_slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow device gets its work in many dispatches and submissions: no watchdog sees a long one."""
    submissions = []
    finish = type(engine().commands).finish
    monkeypatch.setattr(type(engine().commands), "finish", lambda self: (submissions.append(1), finish(self)))
    monkeypatch.setattr(engine(), "rate", 1e3)
    check_forward(replace(named("everything"), batch=2, seqlen_q=70))
    assert len(submissions) > 4


def test_device_without_unified_memory_uses_staging_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate a device without shared memory: all data passes through mapped staging buffers."""
    monkeypatch.setattr(engine().memory, "unified", False)
    engine().memory.trim()
    check_forward(named("everything"))
    engine().memory.reclaim()
    assert any(one.host is None for kept in engine().memory._free.values() for one in kept)
    engine().memory.trim()


def test_buffers_are_reused() -> None:
    check_forward(named("plain"))
    kept = engine().memory.kept
    check_forward(named("plain"))
    assert engine().memory.kept == kept > 0


def test_out_of_device_memory_raises_memory_error_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that cached memory is released before the retry, and that the error states the size."""
    create, failures = engine().device.create, []

    def refuse(name: str, info: Any) -> int:
        if name == "vkAllocateMemory":
            failures.append(name)
            raise api.VulkanError("vkAllocateMemory: out of device memory (-2)", api.OUT_OF_DEVICE_MEMORY)
        return create(name, info)

    engine().memory.trim()
    with monkeypatch.context() as patch:
        patch.setattr(engine().device, "create", refuse)
        with pytest.raises(MemoryError, match=r"no memory for \d+ bytes on .*out of device memory"):
            check_forward(named("plain"))
    assert len(failures) == 2
    check_forward(named("plain"))


def test_lost_device_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = engine()
    with monkeypatch.context() as patch:
        patch.setattr(lost.commands, "_submit", lambda *arguments: api.LOST)
        with pytest.raises(api.DeviceLost, match="vkQueueSubmit: device lost"):
            check_forward(named("plain"))
    check_forward(named("plain"))  # with the plan that was made for the lost one
    assert engine() is not lost and not engine().device.lost


def test_device_that_hangs_raises_after_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_VULKAN_TIMEOUT", "1")
    settings.reload()
    hanging = engine()
    with monkeypatch.context() as patch:
        patch.setattr(hanging.commands, "_wait", lambda *arguments: api.TIMEOUT)
        with pytest.raises(api.DeviceLost, match=r"did not answer within 1 s \(ANYATTN_VULKAN_TIMEOUT\)"):
            check_forward(named("plain"))
    monkeypatch.undo()
    settings.reload()
    check_forward(named("plain"))


def test_offsets_beyond_the_limit_are_refused() -> None:
    x = np.ones((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"offset\[0\] must be from -2\^29 to 2\^29"):
        anyattn.attention(x, x, x, causal=True, offset=10**9, backend="vulkan")


def test_software_device_is_used_only_if_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if not devices.device().info.software:
        pytest.fail("this test expects a software driver")
    monkeypatch.delenv("ANYATTN_VULKAN_SOFTWARE")
    settings.reload()
    x = np.ones((1, 4, 1, 8), np.float32)
    assert "vulkan" not in anyattn.get_available_backends()
    assert "name the backend" in str(dispatch.get("vulkan").available())
    assert np.array_equal(anyattn.attention(x, x, x, backend="vulkan"), x)


def test_unknown_device_error_lists_the_available_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_VULKAN_DEVICE", "abacus")
    settings.reload()
    assert "must be one of 0: " in str(dispatch.get("vulkan").available())
    monkeypatch.undo()
    settings.reload()


NO_DRIVER = {"VK_DRIVER_FILES": "/nowhere.json", "VK_ICD_FILENAMES": "/nowhere.json"}
CALL = """
import numpy as np, anyattn
x = np.ones((1, 4, 1, 8), np.float32)
assert np.array_equal(anyattn.attention(x, x, x), x)
try: anyattn.attention(x, x, x, backend="vulkan")
except anyattn.UnsupportedProblem as error: print(error)
"""


def test_missing_driver_is_reported_as_a_reason() -> None:
    assert "vulkan: vkCreateInstance: incompatible driver" in printed(CALL, **NO_DRIVER)


def test_missing_loader_is_reported_as_a_reason() -> None:
    code = "import ctypes\ndef missing(name, *a, **k): raise OSError(name + ': no such file')\n"
    code += "import anyattn.backends.vulkan.api as api\napi.ctypes.CDLL = missing\n" + CALL
    code = code.replace("anyattn.attention(x, x, x)", "x", 1)  # the native engine is loaded by the same function
    assert "vulkan: no Vulkan loader is installed" in printed(code)


def test_import_and_small_calls_do_not_touch_vulkan() -> None:
    code = "import sys, numpy as np, anyattn\nx = np.ones((1, 4, 1, 8), np.float32)\nanyattn.attention(x, x, x)\n"
    code += "from anyattn.backends.vulkan import api\nprint(api.library.cache_info().currsize)"
    assert printed(code).strip() == "0"


def test_validation_layer_reports_nothing_for_the_forward_pass() -> None:
    """Silent over every path of the forward pass, and heard where a call is wrong."""
    code = (
        "from dataclasses import replace\n"
        "import pytest; from backends.vulkan.common import FORWARD_CASES, check_forward\n"
        "from anyattn.backends.vulkan.engine import current_engine as engine\n"
        "from anyattn.backends.vulkan.api import VulkanError\n"
        "for case in FORWARD_CASES: check_forward(case)\n"
        "def fill(job):\n"
        "    job.commands.fill(job.buffer(64), 62, 0)\n"
        "    with pytest.raises(VulkanError, match='the validation layer reports'): job.finish()\n"
        "engine().run_job(fill)\n"
        "check_forward(FORWARD_CASES[0])  # what the job has left behind is cleared in accordance with the layer\n"
        "print('clean')\n"
    )
    assert printed(code, ANYATTN_VULKAN_VALIDATE="1").strip() == "clean"


def test_call_after_a_failed_job_works() -> None:
    def fail(job: Job) -> None:
        job.commands.fill(job.buffer(64), 64, 0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine().run_job(fail)
    check_forward(named("plain"))
