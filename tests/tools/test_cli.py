"""The command line: what it prints, its exit status, and that it works when parts of the installation do not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import explicit
from anyattn.cli import demo, main
from anyattn.cli.info import AFTER
from anyattn.config import machine, settings
from anyattn.definition.dtypes import ATTENTION_DTYPES
from anyattn.runtime import dispatch
from anyattn.testing import cases
from harness.processes import run_python


def test_info_lists_backends_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == anyattn.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert found["processor"] == machine.processor() and found["cores"] == os.cpu_count()
    assert [name for name, backend in found["backends"].items() if backend["available"]] == dispatch.available()
    assert found["settings"].keys() == {variable for variable, _, _ in settings.VARIABLES.values()}
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*dispatch.names(), "ANYATTN_BACKEND"))
    assert "\n\nCPU engine\n  library " in text  # its own, not the last backend's


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor: 0\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: X at: 2 GHz\n\nprocessor: 1\n",
            "X at: 2 GHz (family 6, model 85)",
        ),
        ("processor : 0\nCPU implementer : 0x41\nCPU part : 0xd0c\n\n", "Arm implementer 0x41, part 0xd0c"),
    ],
)
def test_processor_name_is_read_from_cpuinfo(
    cpuinfo: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor() == name
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "nowhere")
    assert machine.processor()


def test_info_names_the_instruction_set_of_each_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    if "cpu" not in dispatch.available():
        pytest.skip("the native library is not there")
    main(["info", "--json"])
    cpu = json.loads(capsys.readouterr().out)["cpu"]
    assert tuple(cpu["dtypes"]) == ATTENTION_DTYPES
    for found in cpu["dtypes"].values():
        assert found["target"] in cpu["targets"] and found["target"] not in found["reasons"]
        assert {*cpu["targets"]} <= {found["target"], *found["reasons"]} and all(found["reasons"].values())
    assert cpu["num_threads"] >= 1
    main(["info"])
    text = capsys.readouterr().out
    assert f"\n  bfloat16            {cpu['dtypes']['bfloat16']['target']}" in text and AFTER not in text


def test_info_names_the_forced_instruction_set() -> None:
    if "cpu" not in dispatch.available():
        pytest.skip("the native library is not there")
    finished = run_python("-m", "anyattn", "info", "--json", ANYATTN_CPU_TARGET="baseline")
    cpu = json.loads(finished.stdout)["cpu"]
    for found in cpu["dtypes"].values():
        assert found["target"] == "baseline"
        assert set(found["reasons"].values()) <= {"ANYATTN_CPU_TARGET names another"}


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert (exited.value.code, capsys.readouterr().out) == (0, f"anyattn {anyattn.__version__}\n")


@pytest.mark.parametrize(
    "environment",
    [{"ANYATTN_LIBRARY": "/nowhere/libanyattn.so"}, {"ANYATTN_NUM_THREADS": "many"}, {"ANYATTN_CPU_TARGET": "abacus"}],
    ids=lambda environment: next(iter(environment)),
)
def test_info_works_with_a_broken_installation(environment: dict[str, str]) -> None:
    result = run_python("-m", "anyattn", "info", ANYATTN_REQUIRE="", **environment)
    assert result.returncode == 0, result.stderr
    assert next(iter(environment.values())) in result.stdout


def test_info_fails_if_a_required_backend_is_missing() -> None:
    result = run_python("-m", "anyattn", "info", ANYATTN_REQUIRE="cpu", ANYATTN_LIBRARY="/nowhere/libanyattn.so")
    assert result.returncode == 1
    assert "available backends, got cpu" in result.stderr
    assert run_python("-m", "anyattn", "info", ANYATTN_REQUIRE="numpy").returncode == 0


def test_info_does_not_import_torch() -> None:
    code = "import sys; from anyattn.cli import main; main(['info']); assert 'torch' not in sys.modules"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_explain_describes_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    everything = (
        "--dtype bfloat16 --batch 2 --heads 8 --kv-heads 2 --head-dim 40 --head-dim-v 24 --seqlen-q 7 --seqlen-k 90 "
        "--causal --window 5 none --chunk 64 --alignment top-left --softcap 2 --dropout 0.1 --bias --mask --alibi "
        "--sink --scale 0.3 --leftpad --paged 16 --backward --deterministic --batch-invariant --json"
    )
    assert main(["explain", *everything.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] in dispatch.available()
    for feature in (
        "left",
        "right",
        "chunk",
        "softcap",
        "dropout",
        "bias",
        "mask",
        "alibi",
        "sink",
        "paged",
        "backward",
    ):
        assert feature in found["problem"]
    assert main(["explain", "--varlen", "--causal", "--backward", "--backend", "numpy"]) == 0
    assert "packed" in capsys.readouterr().out


def test_explain_agrees_with_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    x = np.ones((1, 16, 2, 8), np.float32)
    assert main(["explain", "--heads", "2", "--head-dim", "8", "--seqlen-q", "16", "--causal"]) == 0
    assert capsys.readouterr().out.strip() == str(anyattn.explain(x, x, x, causal=True))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--device cuda:0", 1, "cuda:0"),
        ("--heads 12 --kv-heads 5", 2, "multiple of nheads_kv"),
        ("--dtype int8", 2, "int8"),
        ("--varlen --bias", 2, "--varlen"),
        ("--backend abacus", 2, "abacus"),
        ("--softcap nan", 2, "softcap"),
    ],
)
def test_explain_reports_wrong_arguments(
    arguments: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments.split()]) == status
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


@pytest.mark.parametrize(
    "arguments", ["", "frobnicate", "info --frobnicate", "explain --batch -1", "verify --backend x"]
)
def test_wrong_usage_is_refused(arguments: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some problems, so that this takes no time; `make test` runs the engines over a larger matrix anyway."""
    names = ("bias", "varlen", "paged", "lengths")
    monkeypatch.setattr(cases, "FEATURES", {name: cases.FEATURES[name] for name in names})


@pytest.mark.usefixtures("few")
def test_verify_passes(capsys: pytest.CaptureFixture[str]) -> None:
    before = settings.current()
    assert main(["verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["left_out"] == []
    assert {result["engine"].split()[0] for result in found["results"]} == {
        name for name in dispatch.names() if not dispatch.get(name).available()
    }
    for result in found["results"]:
        if result["forward"] is None:
            assert (result["engine"], result["dtype"]) == ("vulkan", "float64") and "float64" in result["refused"]
            continue
        assert 0 <= result["forward"] <= 1
        assert bool(result["refused"]) if result["backward"] is None else 0 <= result["backward"] <= 1
    assert settings.current() == before
    assert main(["verify", "--backend", "numpy", "--seed", "3"]) == 0
    assert "16 of 16 agree" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_verify_fails_on_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = explicit.attention_backward

    def wrong(*arguments: Any, **named: Any) -> anyattn.Gradients:
        gradients = right(*arguments, **named)
        return gradients._replace(dk=gradients.dk * 1.1)

    monkeypatch.setattr(explicit, "attention_backward", wrong)
    assert main(["verify", "--backend", "numpy"]) == 1
    assert "MISMATCH numpy, bias: dk" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_verify_fails_if_a_named_backend_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(dispatch.get("numpy")), "available", lambda self, **named: "gone fishing")
    assert main(["verify", "--backend", "numpy"]) == 1
    assert "gone fishing" in capsys.readouterr().out


def test_demo_names_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "NEEDS", ("anyattn", "no_such_package"))
    assert main(["demo"]) == 1
    assert "needs no_such_package" in capsys.readouterr().err
