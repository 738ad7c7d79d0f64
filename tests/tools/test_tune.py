"""Tests of `anyattn tune` for Vulkan, and of the automatic choice: only problems worth offloading go to a GPU.

The GPU is a description; what a real driver computes is the business of the other tests.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import anyattn
from anyattn.backends.vulkan import api, engine, offload, selftest
from anyattn.backends.vulkan import device as devices
from anyattn.backends.vulkan.device import DeviceInfo
from anyattn.backends.vulkan.matrices import Matrices
from anyattn.backends.vulkan.offload import DEFAULT, NEVER, Work
from anyattn.bench import tune_vulkan
from anyattn.bench.timing import Timing
from anyattn.bench.tune_vulkan import Point
from anyattn.cli import main
from anyattn.config import settings
from anyattn.definition.options import Options
from anyattn.definition.passes import BACKWARD, FORWARD
from anyattn.definition.problem import Array, Problem
from anyattn.definition.validate import make_problem
from anyattn.runtime import dispatch
from anyattn.testing import Case, make_inputs
from harness.backends import Engine, engines

GPU = DeviceInfo(
    index=0,
    name="Abacus 9000",
    kind="discrete",
    api=(1, 3, 0),
    driver="test",
    subgroup=32,
    shuffle=True,
    storage_range=2**32 - 1,
    allocation=2**34,
    alignment=16,
    shared_memory=2**15,
    invocations=1024,
    groups=(2**16, 2**16, 2**16),
    cache_key="ab-1",
    extensions=frozenset(),
    matrices=Matrices(off="none"),
)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder that is not there yet."""
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANYATTN_VULKAN_SOFTWARE", raising=False)
    monkeypatch.delenv("ANYATTN_REQUIRE", raising=False)
    settings.reload()
    yield tmp_path / "cache"
    monkeypatch.undo()
    settings.reload()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a described device in the machine; without one, looking for devices fails the test."""

    def put(info: DeviceInfo | None) -> None:
        instance = SimpleNamespace(choose=lambda: info, devices=(info,))
        monkeypatch.setattr(devices, "has_loaded", lambda: True)
        monkeypatch.setattr(devices, "instance", lambda: instance if info else pytest.fail("looked for a device"))
        monkeypatch.setattr(selftest, "usable", lambda *arguments, functions: info)
        monkeypatch.setattr(engine, "current_engine", lambda: None)
        dispatch.forget()

    return put


def problem(
    seqlen_q: int, seqlen_k: int | None = None, *, dtype: str = "float32", back: bool = False, **of: Any
) -> Problem:
    """8 heads of 64: 2,048 operations for each pair of a row and a key."""

    def array(shape: tuple[int, ...], dtype: str = dtype) -> Array:
        return Array(shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype)

    q, k = (array((1, rows, 8, 64)) for rows in (seqlen_q, seqlen_q if seqlen_k is None else seqlen_k))
    given = {"q": q, "k": k, "v": k}
    if back:
        given |= {"out": q, "dout": q, "lse": array((1, 8, seqlen_q), "float32")}
    return make_problem(given, Options(**of), BACKWARD if back else FORWARD)


def chosen(asked: Problem) -> str:
    explained = dispatch.explain(asked, ())
    assert explained.chosen == dispatch.choose(asked, ()).name
    return explained.chosen


def test_only_large_problems_are_offloaded_before_tuning(gpu: Callable[..., None]) -> None:
    gpu(GPU)
    assert 2048.0 * 8192**2 > DEFAULT.operations > 2048.0 * 4096**2
    assert chosen(problem(8192)) == chosen(problem(8192, back=True)) == "vulkan"
    assert chosen(problem(4096)) == chosen(problem(4096, back=True)) == "cpu"


def test_no_device_is_opened_for_small_problems(gpu: Callable[..., None]) -> None:
    gpu(None)
    assert dispatch.choose(problem(512), ()).name == "cpu"
    assert dispatch.choose(problem(1, 2**20), ()).name == "cpu"


def test_tuned_thresholds_are_exact(gpu: Callable[..., None]) -> None:
    gpu(GPU)
    thresholds = {
        ("forward", "float32"): offload.work(problem(1000)),
        ("backward", "float32"): offload.work(problem(500, back=True)),
        ("forward", "float16"): NEVER,
    }
    offload.save_thresholds(GPU, thresholds)
    assert dict(offload.tuned_thresholds(GPU)) == thresholds
    assert [chosen(problem(n)) for n in (999, 1000)] == ["cpu", "vulkan"]
    assert [chosen(problem(n, back=True)) for n in (499, 500)] == ["cpu", "vulkan"]
    assert chosen(problem(16384, dtype="float16")) == "cpu"
    assert [chosen(problem(n, dtype="bfloat16")) for n in (4096, 8192)] == ["cpu", "vulkan"]  # not measured


def test_problems_with_few_operations_per_byte_stay_on_the_cpu(gpu: Callable[..., None]) -> None:
    """Decoding over a cache of any length, and a narrow window, are no more than their transfers."""
    gpu(GPU)
    offload.save_thresholds(GPU, {("forward", "float32"): offload.work(problem(512))})
    assert chosen(problem(512)) == "vulkan"
    assert chosen(problem(1, 2**20)) == "cpu"
    assert chosen(problem(2**14, left=15, right=0)) == "cpu"
    refused = dispatch.explain(problem(1, 2**20), ()).reasons["vulkan"]
    [reason] = refused
    assert "operations per byte do not pay for the transfers: at least 1.3e+02 are needed" in reason


def test_tuning_of_another_device_is_ignored(gpu: Callable[..., None]) -> None:
    other = replace(GPU, cache_key="ab-2")
    offload.save_thresholds(other, {("forward", "float32"): Work(1.0, 0.0)})
    for info, name in ((GPU, "cpu"), (other, "vulkan")):
        gpu(info)
        assert chosen(problem(512)) == name
    offload.save_thresholds(GPU, {("forward", "float32"): NEVER})
    assert offload.tuned_thresholds(other) == {("forward", "float32"): (1.0, 0.0)}


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", '{"x": 1}', '{"x": {"forward": null}}', '{"x": {"forward float32": [NaN, 1]}}']
)
def test_malformed_file_is_reported_and_ignored(text: str, _cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    _cache.mkdir()
    (_cache / offload.FILE).write_text(text)
    with caplog.at_level(logging.WARNING, logger="anyattn"):
        assert offload.reasons_to_stay(problem(4096)) and not offload.reasons_to_stay(problem(8192))
    assert len(caplog.messages) == 1 and str(_cache / offload.FILE) in caplog.messages[0]


def test_software_device_is_not_chosen(gpu: Callable[..., None]) -> None:
    gpu(replace(GPU, kind="software"))
    offload.save_thresholds(GPU, {("forward", "float32"): Work(1.0, 0.0)})
    assert chosen(problem(8192)) == "cpu"
    assert "is a software driver" in dispatch.explain(problem(8192), ()).reasons["vulkan"][0]
    assert dispatch.choose(problem(4), ("vulkan",)).name == "vulkan"


def test_a_large_problem_without_a_gpu_is_logged_once(
    gpu: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    gpu(replace(GPU, kind="software"))
    dispatch._passed_over.clear()
    with caplog.at_level(logging.INFO, logger="anyattn"):
        for asked in (problem(8192), problem(8193), problem(512)):
            assert dispatch.choose(asked, ()).name == "cpu"
    assert len(caplog.messages) == 1 and "skipping backend vulkan" in caplog.messages[0]


def test_software_device_is_chosen_if_the_settings_allow_it(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(replace(GPU, kind="software"))
    offload.save_thresholds(GPU, {("forward", "float32"): Work(1.0, 0.0)})
    monkeypatch.setenv("ANYATTN_VULKAN_SOFTWARE", "1")
    settings.reload()
    assert chosen(problem(512)) == "vulkan"


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        (Case("plain", batch=2, seqlen_q=30, seqlen_k=50), 2 * 30 * 50),
        (Case("causal", batch=2, seqlen_q=30, seqlen_k=50, causal=True), 2 * 30 * 50),
        (Case("window", batch=2, seqlen_q=30, seqlen_k=50, window=(7, 2)), 2 * 30 * 10),
        (Case("wide", batch=2, seqlen_q=30, seqlen_k=50, window=(100, 2)), 2 * 30 * 50),
        (Case("past", batch=2, seqlen_q=30, seqlen_k=50, window=(7, None), chunk=20), 2 * 30 * 20),
    ],
    ids=str,
)
def test_work_counts_operations_and_transferred_bytes(case: Case, pairs: int) -> None:
    """Compare with a count by hand: inputs to the device, results back, in the backward also dout and gradients."""
    case = replace(case, head_dim=40, head_dim_v=24, nheads_kv=2, group=3, dtype="float16", bias="full", mask="row")
    inputs = make_inputs(case)
    q, k, v, bias, mask = (inputs.arguments[name] for name in ("q", "k", "v", "bias", "mask"))
    operations = 2 * 6 * pairs * (40 + 24)
    out = 2 * 30 * 6 * 24 * 2
    there = q.nbytes + k.nbytes + v.nbytes + bias.size * 2 + mask.size
    assert offload.work(inputs.describe()[0]) == (operations, operations / (there + out))
    gradients = q.nbytes + k.nbytes + v.nbytes + bias.size * 2
    assert offload.work(inputs.describe(BACKWARD)[0]) == (
        operations,
        operations / (there + 2 * out + gradients),
    )


def test_packed_sequences_are_counted_by_their_rows() -> None:
    q = Array((100, 8, 64), (512, 64, 1), "float32")
    table = Array((9,), (1,), "int32")
    packed = make_problem(
        {"q": q, "k": q, "v": q, "cu_seqlens_q": table, "cu_seqlens_k": table},
        Options(max_seqlen_q=90, max_seqlen_k=90),
    )
    assert offload.work(packed).operations == 2048 * 100 * 90


@pytest.mark.parametrize(
    ("wins", "expected"), [("", None), ("000", None), ("011", 1), ("101", 2), ("110", None), ("111", 0), ("0101", 3)]
)
def test_threshold_is_the_smallest_size_from_which_the_device_always_wins(wins: str, expected: int | None) -> None:
    found = [Point("forward", "float32", 128 << i, 1.0, 0.9 if won == "1" else 0.96) for i, won in enumerate(wins)]
    want = NEVER if expected is None else offload.work(problem(128 << expected))
    assert tune_vulkan.find_threshold(found) == want


class Clock:
    """Stands in for bench.timing.measure: the native engine takes n^2, the GPU 1.5e6 and a hundredth of it."""

    def __init__(self) -> None:
        self.seqlens: list[int] = []

    def __call__(self, functions: Mapping[str, Any], seconds: float, rounds: int) -> dict[str, Timing]:
        n = functions["cpu"]()
        self.seqlens.append(n)
        times = {"cpu": n**2 * 1e-8, "vulkan": (1.5e6 + n**2 / 100) * 1e-8}
        return {name: Timing(time, time, time, 3) for name, time in times.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(tune_vulkan, "measure", found)
    monkeypatch.setattr(tune_vulkan, "make_inputs", lambda dtype, seqlen: seqlen)
    names = tune_vulkan.BACKENDS
    monkeypatch.setattr(tune_vulkan, "make_calls", lambda direction, n: dict.fromkeys(names, lambda: n))
    return found


def test_tune_writes_its_measurements(
    gpu: Callable[..., None], clock: Clock, _cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(GPU)
    assert main(["tune"]) == 0
    text = capsys.readouterr().out
    assert "Abacus 9000 is used from" in text and str(_cache / offload.FILE) in text
    assert clock.seqlens[:7] == [128, 256, 512, 1024, 2048, 4096, 128]  # the last two before 128 are won
    thresholds = offload.tuned_thresholds(GPU)
    assert thresholds["forward", "float16"] == offload.work(problem(2048, dtype="float16"))
    assert set(thresholds) >= {(way, dtype) for way in ("forward", "backward") for dtype in ("float32", "float16")}
    assert [chosen(problem(n, back=back)) for n in (1024, 2048) for back in (False, True)] == ["cpu"] * 2 + [
        "vulkan"
    ] * 2
    assert main(["tune", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vulkan"]["crossover"]["forward float32"] == list(offload.work(problem(2048)))
    assert len(list(_cache.iterdir())) == 1


def test_info_reports_the_threshold_of_each_device(
    gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for info, said in (
        (GPU, "not measured: anyattn tune"),
        (replace(GPU, kind="software"), "never, because it is a software driver"),
    ):
        gpu(info)
        main(["info"])
        assert said in capsys.readouterr().out
    gpu(GPU)
    offload.save_thresholds(GPU, {("forward", "float32"): Work(1e9, 128.0), ("backward", "float32"): NEVER})
    main(["info"])
    assert "forward float32 from 1e+09 operations, 1.3e+02 per byte; backward float32 never" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["tune", *arguments]) == 1
    return capsys.readouterr().err


def test_tune_without_a_gpu_reports_the_reason(
    gpu: Callable[..., None], _cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(replace(GPU, kind="software"))
    assert "vulkan is not available: Abacus 9000 is a software driver" in refused(capsys)
    gpu(replace(GPU, api=(1, 0, 0)))
    assert "vulkan is not available: Abacus 9000 supports Vulkan 1.0.0" in refused(capsys)
    assert not _cache.exists()


@pytest.mark.usefixtures("clock")
def test_failing_device_writes_no_file(
    gpu: Callable[..., None], _cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(GPU)

    def lose(*arguments: Any, **named: Any) -> None:
        raise api.DeviceLost("Abacus 9000: vkQueueSubmit: device lost")

    monkeypatch.setattr(tune_vulkan, "measure", lose)
    assert "device lost" in refused(capsys)
    assert not _cache.exists()


@pytest.mark.usefixtures("clock")
def test_unwritable_cache_is_an_error(
    gpu: Callable[..., None], _cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(GPU)
    _cache.write_text("a file")
    assert str(_cache) in refused(capsys)


@pytest.mark.parametrize("seconds", ["0", "-1", "61", "nan", "x"])
def test_wrong_seconds_are_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--seconds", seconds])
    assert "must be seconds above 0 and up to 60" in capsys.readouterr().err


@pytest.mark.skipif(Engine("vulkan") not in engines(), reason="no Vulkan device: .ci/run requires one")
def test_tune_measures_the_available_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANYATTN_VULKAN_SOFTWARE", "1")
    settings.reload()
    monkeypatch.setattr(tune_vulkan, "SEQLENS", (8, 16))
    assert main(["tune", "--seconds", "0.01", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["vulkan"]
    assert found["device"] == devices.instance().choose().name
    assert all(point[3] > 0 and point[4] > 0 for point in found["points"])
    assert {point[0] for point in found["points"]} == {"forward", "backward"}
    assert anyattn.__version__
