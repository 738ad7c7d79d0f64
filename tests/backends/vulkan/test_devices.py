"""Choice and refusal of Vulkan devices, and release of their memory. Most devices here are descriptions."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anyattn
from anyattn.backends.vulkan import api
from anyattn.backends.vulkan import device as devices
from anyattn.backends.vulkan.device import Instance
from anyattn.backends.vulkan.device_info import STORAGE_BUFFERS, DeviceInfo
from anyattn.backends.vulkan.engine import current_engine
from anyattn.backends.vulkan.matrices import Matrices
from anyattn.vulkan import DeviceArray, release_memory
from backends.vulkan.common import check_forward, fresh_plans, needs_vulkan
from harness.cases import named

CARD = DeviceInfo(
    index=0,
    name="card",
    kind="discrete",
    api=(1, 3, 0),
    driver="Abacus 7.1",
    subgroup=32,
    shuffle=True,
    storage_range=2**32 - 1,
    allocation=2**32,
    alignment=16,
    shared_memory=48 << 10,
    invocations=1024,
    groups=(65535,) * 3,
    cache_key="ab-1",
    extensions=frozenset(),
    matrices=Matrices(off="none"),
    memory=8 << 30,
)
LARGE_CARD = replace(CARD, name="large card", memory=24 << 30)
# Of machines with a software driver, an old card, and a translation layer next to the cards' own drivers.
TRANSLATED = replace(CARD, name="Microsoft Direct3D12 (card)", driver="Dozen Mesa 25.1", memory=32 << 30)
INTEGRATED = replace(CARD, name="integrated", kind="integrated", memory=64 << 30)
VIRTUAL, OTHER = (replace(CARD, name=kind, kind=kind) for kind in ("virtual", "other"))
SOFTWARE = replace(CARD, name="software", kind="software", memory=64 << 30)
OLD = replace(CARD, name="old card", api=(1, 0, 3))
WEAK = replace(CARD, name="weak card", storage_buffers=8)
BEST_FIRST = (LARGE_CARD, CARD, INTEGRATED, VIRTUAL, OTHER, TRANSLATED, SOFTWARE, OLD)


def choose(*found: DeviceInfo) -> DeviceInfo:
    instance = Instance.__new__(Instance)
    instance.__dict__["devices"] = found
    return instance.choose()


@pytest.mark.parametrize("better", range(len(BEST_FIRST) - 1))
def test_the_best_device_is_chosen_in_any_order(better: int) -> None:
    best, worse = BEST_FIRST[better : better + 2]
    assert choose(best, worse) is choose(worse, best) is best
    rest = BEST_FIRST[better:]
    assert choose(*rest) is choose(*reversed(rest)) is best


def test_of_equal_devices_the_first_is_chosen() -> None:
    twins = [replace(CARD, index=index) for index in range(2)]
    assert choose(*twins) is twins[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"api": (1, 0, 3)}, "card supports Vulkan 1.0.3, but 1.1 is needed"),
        ({"storage_buffers": 11}, "card has only 11 storage buffers for one shader (12 are needed)"),
        ({"shared_memory": 2048}, "card has only 2048 bytes of shared memory (4096 are needed)"),
        (
            {"storage_buffers": 4, "invocations": 64},
            "card has only 4 storage buffers for one shader (12 are needed), 64 invocations of one workgroup "
            "(128 are needed)",
        ),
        # the least that Vulkan asks of a device, but for storage buffers
        ({"shared_memory": 16384, "invocations": 128, "groups": (65535,) * 3}, ""),
    ],
)
def test_limits_below_what_the_shaders_need_are_refused(changes: dict[str, Any], reason: str) -> None:
    assert replace(CARD, **changes).refusal() == reason


def test_devices_that_meet_the_limits_come_first() -> None:
    assert choose(WEAK, SOFTWARE) is SOFTWARE
    assert choose(WEAK, OLD) is WEAK  # to name its reason


@needs_vulkan
@fresh_plans
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"maxPerStageDescriptorStorageBuffers": 8}, "has only 8 storage buffers for one shader"),
        ({"maxComputeSharedMemorySize": 1024}, "has only 1024 bytes of shared memory"),
        ({"maxComputeWorkGroupInvocations": 128, "maxComputeSharedMemorySize": 16384}, ""),
    ],
)
@pytest.mark.usefixtures("nothing_required")
def test_limits_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], reason: str) -> None:
    """A driver whose answers are lowered on their way."""
    original = api.instance_function

    def lowered(instance: Any, name: str, *arguments: Any, **result: Any) -> Any:
        function = original(instance, name, *arguments, **result)
        if not name.startswith("vkGetPhysicalDeviceProperties"):
            return function

        def call(physical: Any, at: int) -> None:
            function(physical, at)
            found = (
                api.Properties2.from_address(at).properties if name.endswith("2") else api.Properties.from_address(at)
            )
            for limit, value in changes.items():
                setattr(found.limits, limit, value)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(api, "instance_function", lowered)
        devices.forget()
        if reason:
            with pytest.raises(anyattn.UnsupportedProblem, match=reason):
                check_forward(named("plain"))
        else:
            check_forward(named("plain"))
            assert devices.device().info.invocations == 128
    devices.forget()


@needs_vulkan
def test_info_includes_the_memory_of_the_device() -> None:
    info = devices.device().info
    assert info.memory > 2**20 and info.storage_buffers >= STORAGE_BUFFERS
    assert f"{info.memory} bytes" in info.describe()["memory"]


@needs_vulkan
def test_release_memory_frees_all_but_device_arrays() -> None:
    """Release the memory of finished calls, and keep the arrays on the device."""
    release_memory()  # of the devices of other tests
    values = np.random.default_rng(0).standard_normal((1, 40, 2, 16), np.float32)
    array = DeviceArray(values)
    check_forward(named("everything"))
    memory = current_engine().memory
    kept = memory.kept
    assert kept > 0 and release_memory() == kept
    assert memory.kept == 0 and release_memory() == 0
    assert np.array_equal(array.numpy(), values)
    check_forward(named("everything"))
    del array
    assert release_memory() > 0


@needs_vulkan
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_device_arrays_survive_copies(dtype: Any, copied: Any) -> None:
    array = DeviceArray(np.random.default_rng(0).standard_normal((1, 9, 2, 5)).astype(dtype))
    other = copied(array)
    assert other.buffer is not array.buffer and other.dtype == array.dtype
    assert other.numpy().tobytes() == array.numpy().tobytes()


def test_homebrew_loaders_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS does not search its folder on Apple silicon."""
    tried: list[str] = []

    def load(name: str) -> str:
        tried.append(name)
        if name != "/opt/homebrew/lib/libvulkan.1.dylib":
            raise OSError(f"{name}: no such file")
        return name

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(api.ctypes, "CDLL", load)
    assert api.library.__wrapped__() == tried[-1]
    assert tried[:3] == ["libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib"]
    monkeypatch.setattr(api.ctypes, "CDLL", lambda name: load(name + "?"))
    with pytest.raises(api.VulkanError, match=r"/usr/local/lib/libMoltenVK\.dylib"):
        api.library.__wrapped__()
