"""What the README, the guide and the docstrings show runs; the README's figures are those of the committed results.

The Python blocks of a page of the guide are one program. A block that begins with a file's name is that file, and a
console block runs it: what the page shows below the command is what it prints.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import anyattn
import anyattn.api
import anyattn.compat.aule
import anyattn.compat.flash_attention
import anyattn.compat.flash_attention_amd
import anyattn.compat.flash_attn.bert_padding
import anyattn.compat.flash_attn.layers.rotary
import anyattn.compat.flash_attn.ops.triton.rotary
import anyattn.compat.flash_attn_triton
import anyattn.compat.installation
import anyattn.compat.onnx
import anyattn.compat.torch
import anyattn.compat.xformers
import anyattn.dispatch
import anyattn.heads_first
import anyattn.native
import anyattn.nn
from anyattn import compat
from anyattn.bench import markdown

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
# The packages of these have left Python 3.10 behind (requirements/test.txt).
RECENT = {f"docs/use-with/{name}.md" for name in ("diffusers", "onnx", "transformers")}
RUN = [name for name in PAGES if sys.version_info >= (3, 11) or name not in RECENT]


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text); Python with as many empty lines before it as errors need to name the page's line."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCKS.finditer(text):
        language, block = found.groups()
        yield language, "\n" * (text.count("\n", 0, found.start()) + 1) * (language == "python") + block


@pytest.mark.parametrize("block", [text for language, text in blocks(README) if language == "python"])
def test_readme_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.fixture
def _restored() -> Iterator[None]:
    """Nothing that a page activates outlives it, even if it fails."""
    with torch.random.fork_rng():
        yield
    compat.uninstall()
    anyattn.compat.aule.uninstall()
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    if "anyattn.compat.transformers" in sys.modules:
        anyattn.compat.transformers.uninstall_flash_attention_2()


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("name", RUN)
def test_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for language, block in blocks(PAGES[name]):
        file = re.match(r"# (\w+\.py)\n", block.lstrip("\n"))
        if language == "python" and file:
            assert f" {file[1]}\n" in PAGES[name].read_text(encoding="utf-8"), f"no console block runs {file[1]}"
            (tmp_path / file[1]).write_text(block.lstrip("\n"))
        elif language == "python":
            exec(compile(block, name, "exec"), namespace)
        elif language == "console":
            check_console(block, tmp_path)


def check_console(block: str, folder: Path) -> None:
    """Each `$ python ...` prints the lines below it."""
    source = str(Path(anyattn.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    commands = re.findall(r"^\$ python (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    assert len(commands) == block.count("$ ") > 0
    for arguments, shown in commands:
        result = subprocess.run(
            [sys.executable, *arguments.split()],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert (result.returncode, result.stdout) == (0, shown), result.stderr


def test_links_of_the_guide_lead_somewhere() -> None:
    for path in (README, *PAGES.values()):
        for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", BLOCKS.sub("", path.read_text(encoding="utf-8"))):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(path.parent / target), f"{path.name}: {target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index() -> None:
    index = PAGES["docs/index.md"].read_text(encoding="utf-8")
    for name in PAGES.keys() - {"docs/index.md"}:
        assert f"]({name.removeprefix('docs/')})" in index, name


@pytest.mark.parametrize(
    "module",
    [
        anyattn,
        anyattn.api,
        anyattn.compat.aule,
        anyattn.compat.flash_attention,
        anyattn.compat.flash_attention_amd,
        anyattn.compat.flash_attn.bert_padding,
        anyattn.compat.flash_attn.layers.rotary,
        anyattn.compat.flash_attn.ops.triton.rotary,
        anyattn.compat.flash_attn_triton,
        anyattn.compat.installation,
        anyattn.compat.onnx,
        anyattn.compat.torch,
        anyattn.compat.xformers,
        anyattn.dispatch,
        anyattn.heads_first,
        anyattn.native,
        anyattn.nn,
    ],
    ids=lambda module: module.__name__,
)
def test_docstring_examples(module: object) -> None:
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)  # type: ignore[arg-type]
    assert tried > 0
    assert failed == 0


def test_every_public_name_is_documented() -> None:
    for name in anyattn.__all__:
        assert getattr(anyattn, name).__doc__, name


def test_readme_tables_are_the_committed_results() -> None:
    text = README.read_text()
    assert markdown.fill(text, json.loads(RESULTS.read_text())) == text
    assert "| float32 |" in text
