"""The examples on small sizes: each compares its results with a second computation and raises if they differ."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from anyattn.cli import demo
from harness.paths import ROOT
from harness.processes import run_python

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
import notebooks

FOLDER = demo.script().parent
SHORT = (
    *("server.py", "packed.py", "transformers_model.py", "long_context.py", "several_processes.py"),
    "cpp/generate.cpp",
)


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_server_answers_do_not_depend_on_other_requests(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("server").main(requests=5, num_pages=9, context=64)
    printed = capsys.readouterr().out
    assert "all 5 answers equal" in printed
    assert " 0 waiting, 9 free pages" in printed  # every page came back
    assert any(" 0 waiting" not in line for line in printed.splitlines()[:-1])  # requests had to wait for pages


def test_server_refuses_a_request_that_never_fits() -> None:
    with pytest.raises(ValueError, match="num_pages must be"):
        importlib.import_module("server").main(requests=1, num_pages=1, context=64)


def test_perplexity_with_quantised_caches(capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.import_module("quantised_cache").main(steps=3, context=48)
    exact = found.pop("float32")
    assert all(0 < abs(value / exact - 1) < 0.01 for value in found.values())
    assert "int8" in capsys.readouterr().out


def test_packed_training_equals_padded_training(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("packed").main(steps=3, count=4, longest=48)
    assert "largest difference of the losses" in capsys.readouterr().out


def test_ring_of_pages_equals_one_call_in_constant_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = importlib.import_module("long_context")
    monkeypatch.setattr(example, "WINDOW", 32)
    monkeypatch.setattr(example, "PAGE_SIZE", 8)
    example.main(length=1024, checked=120)
    assert "1,024" in capsys.readouterr().out


def test_training_over_processes_equals_training_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("several_processes").main(context=512, processes=2, steps=2)
    printed = capsys.readouterr().out
    assert "2 processes" in printed and "step 2" in printed


def test_meanflow_step_equals_the_math_path_in_double_precision() -> None:
    import torch

    importlib.import_module("meanflow").compare(tokens=100, dtype=torch.float64)


def test_meanflow_step_needs_a_tenth_of_the_math_paths_memory() -> None:
    """In a process of its own, because freed memory of other tests would be reused and not counted."""
    done = run_python(FOLDER / "meanflow.py", "--tokens", "1024", "--steps", "2")
    assert done.returncode == 0, done.stderr
    ours, theirs = (float(x) for x in re.findall(r"([\d.]+) MiB", done.stdout))
    assert 10 * ours <= theirs


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers has left Python 3.10 behind")
def test_transformers_model_generates_the_tokens_of_eager_attention(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("transformers_model").main(count=8)
    assert "anyattn wrote" in capsys.readouterr().out


@pytest.mark.parametrize("name", SHORT)
def test_example_is_short(name: str) -> None:
    assert len(Path(FOLDER, name).read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_and_stores_its_outputs(path: Path) -> None:
    """Numbers and pixels differ between machines, so only the kinds of outputs are compared: `make notebooks`."""
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000
    notebook = json.loads(text)
    ran = [(cell["outputs"], outputs) for cell, outputs in notebooks.run(notebook)]
    assert sum(len(outputs) for _, outputs in ran) > 3
    for committed, outputs in ran:
        assert [output["output_type"] for output in committed] == [output["output_type"] for output in outputs]


def test_links_of_the_examples_have_targets() -> None:
    listed = set()
    for path in [ROOT / "examples/README.md", *ROOT.glob("examples/notebooks/*.ipynb")]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
            listed.add((path.parent / target).resolve())
    programs = {path for path in (ROOT / "examples").rglob("*") if path.suffix in {".c", ".cpp", ".ipynb", ".py"}}
    assert programs - listed == {ROOT / "examples/memory.py"}
