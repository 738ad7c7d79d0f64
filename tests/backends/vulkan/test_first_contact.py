"""No driver is loaded that nobody has named before a child process has tried it; the child's answer is kept."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import anyattn
from anyattn.backends.vulkan import api, driver_files, first_contact, offload
from anyattn.backends.vulkan import device as devices
from anyattn.backends.vulkan.first_contact import Report
from anyattn.config import settings
from anyattn.definition.options import Options
from anyattn.definition.problem import contiguous
from anyattn.definition.validate import make_problem
from anyattn.runtime import dispatch
from backends.vulkan.common import needs_vulkan
from harness.processes import run_python

pytestmark = needs_vulkan  # they need its loader
needs_cc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compiles a driver, and reads /proc")

LARGE = np.broadcast_to(np.zeros(64, np.float32), (8, 16384, 16, 64))
SMALL = LARGE[:1, :8]
SOURCE = Path(__file__).parents[1] / "emulators" / "broken_driver.c"
PROGRAM = """
import numpy as np, anyattn
large = np.broadcast_to(np.zeros(64, np.float32), (8, 16384, 16, 64))
small = np.zeros((1, 8, 1, 16), np.float32)
anyattn.attention(small, small, small)
anyattn.warmup(large, large, large)
print(anyattn.get_available_backends())
print(anyattn.explain(large, large, large).reasons["vulkan"])
try: anyattn.attention(small, small, small, backend="vulkan")
except anyattn.UnsupportedProblem as error: print(error)
"""
LOADED = """
import numpy as np, anyattn
large = np.broadcast_to(np.zeros(64, np.float32), (8, 16384, 16, 64))
assert "vulkan" in anyattn.explain(large, large, large).reasons
print(sum(line.endswith(driver) for line in open("/proc/self/maps").read().split() for driver in DRIVERS))
"""


def fresh(code: str, cache: Path | str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that requires nothing and takes no driver that runs on the CPU."""
    variables = {"ANYATTN_CACHE": str(cache), **variables}
    return run_python(*(arguments or ("-c", code)), without=("ANYATTN_",), **variables)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the only driver is one that ends the process."""
    folder = tmp_path_factory.mktemp("driver")
    library, manifest = folder / "libbroken.so", folder / "broken.json"
    subprocess.run(["cc", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    described = {"library_path": str(library), "api_version": "1.3.0"}
    manifest.write_text(json.dumps({"file_format_version": "1.0.0", "ICD": described}), encoding="utf-8")
    return {"VK_DRIVER_FILES": str(manifest), "VK_ICD_FILENAMES": str(manifest)}


@needs_cc
def test_broken_driver_crashes_one_child_process_only(broken: dict[str, str], tmp_path: Path) -> None:
    """Neither a large call that names no backend nor a named one ends the program, and later programs do not ask."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    for _ in range(2):
        result = fresh(PROGRAM, cache, BROKEN_DRIVER_LOG=str(log), **broken)
        assert result.returncode == 0, result.stderr
        available, explained, named = result.stdout.strip().split("\n", 2)
        assert "vulkan" not in available
        for text in (explained, named):
            assert "ended the process that tried them (SIGABRT: broken driver: no GPU here)" in text
        [kept] = cache.iterdir()
        assert f"then delete {kept}" in explained
    assert log.read_bytes() == b"x"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_cc
def test_info_reports_a_broken_driver(broken: dict[str, str], tmp_path: Path) -> None:
    result = fresh("", tmp_path, "-m", "anyattn", "info", **broken)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("SIGABRT: broken driver: no GPU here") == 2  # of the backend, and of its devices


@needs_cc
@pytest.mark.parametrize("variables", [{}, {"ANYATTN_VULKAN_SOFTWARE": "1"}], ids=["not taken", "taken"])
def test_rejected_driver_is_not_loaded(variables: dict[str, str], tmp_path: Path) -> None:
    """The answer of the child is enough to leave a driver alone that runs on the CPU."""
    names = [Path(library).name for _, _, library, _ in map(driver_files._manifest, driver_files.manifests())]
    code = f"DRIVERS = {[name for name in names if name]}\n{LOADED}"
    result = fresh(code, tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert (int(result.stdout) > 0) is bool(variables)


def test_small_problems_start_no_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_loaded", lambda: False)
    monkeypatch.setattr(first_contact, "report", Mock(side_effect=AssertionError("asked")))
    reasons = anyattn.explain(SMALL, SMALL, SMALL).reasons["vulkan"]
    assert "do not pay for the transfers" in reasons[0]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, in a process that has not asked yet."""
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANYATTN_VULKAN_SOFTWARE", raising=False)
    monkeypatch.delenv("ANYATTN_REQUIRE", raising=False)
    settings.reload()
    monkeypatch.setattr(first_contact, "_reports", {})
    yield tmp_path / "cache"
    monkeypatch.undo()
    settings.reload()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Mock:
    """Stands in for the child; each call of `again` is a new process."""
    mock = Mock(return_value=(Report("Abacus", "discrete", "ab-1"), True))
    monkeypatch.setattr(first_contact, "_ask", mock)
    return mock


def again() -> Report:
    first_contact._reports.clear()
    return first_contact.report()


def test_child_process_describes_the_chosen_device(cache: Path) -> None:
    info = devices.instance().choose()
    assert first_contact.report() == Report(info.name, info.kind, info.cache_key)
    assert first_contact.known_crash() == ""


def test_report_is_cached_for_the_same_drivers(asked: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest, library = tmp_path / "icd.json", tmp_path / "driver.so"
    library.write_bytes(b"1")
    manifest.write_text('{"ICD": {"library_path": "./driver.so"}}')
    monkeypatch.setenv("VK_DRIVER_FILES", str(manifest))
    assert again() == again() == Report("Abacus", "discrete", "ab-1")
    assert asked.call_count == 1
    library.write_bytes(b"22")  # a new driver
    again(), again()
    assert asked.call_count == 2
    os.utime(manifest, (1, 1))
    again(), again()
    assert asked.call_count == 3
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path))  # a folder of manifests
    again(), again()
    assert asked.call_count == 4
    monkeypatch.setenv("ANYATTN_VULKAN_DEVICE", "2")
    settings.reload()
    again(), again()
    assert asked.call_count == 5


@pytest.mark.parametrize("failure", [Report(refusal="no device"), Report(crash="SIGSEGV")], ids=["refusal", "crash"])
def test_failed_report_is_repeated_after_a_day(asked: Mock, monkeypatch: pytest.MonkeyPatch, failure: Report) -> None:
    asked.return_value = failure, True
    now = first_contact.time.time()
    clock = Mock(return_value=now)
    monkeypatch.setattr(first_contact.time, "time", clock)
    for hours, calls in ((0, 1), (23, 1), (25, 2), (-1, 3)):
        clock.return_value = now + 3600 * hours
        assert again() == failure and asked.call_count == calls
    assert bool(first_contact.known_crash()) is bool(failure.crash)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", '{"time": 0}', '{"time": 0, "report": {"name": 3}}', "[" * 10**5]
)
def test_malformed_cache_file_is_ignored(asked: Mock, cache: Path, text: str) -> None:
    again()
    [kept] = cache.iterdir()
    kept.write_text(text)
    assert again().name == "Abacus" and asked.call_count == 2
    assert json.loads(kept.read_text())["report"]["name"] == "Abacus"


def test_cache_file_writable_by_others_is_ignored(asked: Mock, cache: Path) -> None:
    again()
    [kept] = cache.iterdir()
    kept.chmod(0o666)
    again()
    assert asked.call_count == 2


def test_without_a_cache_folder_each_process_checks_the_driver_once(
    asked: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYATTN_CACHE", f"{os.devnull}/anyattn")
    settings.reload()
    first_contact.report(), first_contact.report()
    assert asked.call_count == 1
    again()
    assert asked.call_count == 2


def child_that(monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[Report, bool]:
    monkeypatch.setattr(first_contact, "CHILD", code)
    return first_contact._ask()


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("import os; os.kill(os.getpid(), 11)", Report(crash="SIGSEGV")),
        ("import sys; sys.exit('no luck')", Report(crash="exit status 1: no luck")),
        ("print('noise')", Report(crash="exit status 0")),
        ("print('noise'); print('{{\"name\": \"x\"}}')", Report(name="x")),
        ('print(\'{{"refusal": "none"}}\')', Report(refusal="none")),
    ],
)
def test_definite_reports_are_cached(monkeypatch: pytest.MonkeyPatch, code: str, report: Report) -> None:
    assert child_that(monkeypatch, code) == (report, True)


def test_reports_that_do_not_depend_on_the_driver_are_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    found, lasting = child_that(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    assert "SIGKILL ended the process" in found.refusal and not found.crash and not lasting
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/opt/game/game.exe")
        found, lasting = first_contact._ask()
        assert "no Python is available" in found.refusal and "Name the backend" in found.refusal and not lasting
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        found, lasting = first_contact._ask()
        assert "no child process could be started" in found.refusal and not lasting
    monkeypatch.setattr(api, "library", Mock(side_effect=api.VulkanError("no Vulkan loader is installed")))
    assert first_contact._ask() == (Report(refusal="no Vulkan loader is installed"), False)


def test_driver_that_hangs_is_refused_after_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "SECONDS", 1)
    found, lasting = child_that(monkeypatch, "import time; time.sleep(100)")
    assert "did not answer within 1 s. Name the backend to wait" in found.refusal and lasting


def test_child_process_does_not_import_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    code = first_contact.CHILD + "\nassert not {{'numpy', 'site', 'anyattn.api'}} & set(sys.modules), sys.modules\n"
    found, _ = child_that(monkeypatch, code)
    assert found.name and not found.crash


def explained(monkeypatch: pytest.MonkeyPatch, report: Report) -> list[str]:
    """Return why automatic choice does not take the described device for a large problem; no driver is loaded."""
    monkeypatch.setattr(devices, "has_loaded", lambda: False)
    monkeypatch.setattr(first_contact, "report", lambda: report)
    monkeypatch.setattr(devices, "instance", Mock(side_effect=AssertionError("loaded")))
    dispatch.forget()
    return anyattn.explain(LARGE, LARGE, LARGE).reasons["vulkan"]


def test_integrated_gpu_is_not_chosen_before_tuning(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Report("Abacus 12", "integrated", "ab-1")
    [reason] = explained(monkeypatch, gpu)
    assert reason == "Abacus 12 is an unmeasured integrated GPU: run `anyattn tune`, or name the backend"
    assert offload.describe(gpu) == "never; not measured: anyattn tune"
    offload.save_thresholds(gpu, {("forward", "float32"): offload.Work(1e10, 100.0)})
    with pytest.raises(AssertionError, match="loaded"):  # to compute
        explained(monkeypatch, gpu)
    problems = {
        dtype: make_problem(dict.fromkeys("qkv", contiguous((1, 8192, 8, 64), dtype)), Options())
        for dtype in ("float32", "float16")
    }
    assert not offload.reasons_to_stay(problems["float32"], gpu)
    assert "unmeasured" in offload.reasons_to_stay(problems["float16"], gpu)[0]


def test_driver_on_the_cpu_is_not_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [reason] = explained(monkeypatch, Report("Pipe", "software", "p-1"))
    assert reason.startswith("Pipe is a software driver")
    [reason] = explained(monkeypatch, Report(refusal="Pipe offers 4 storage buffers for one shader; 12 are needed"))
    assert reason == "Pipe offers 4 storage buffers for one shader; 12 are needed"
