"""Code of the README, of the pages and of the docstrings runs, and their generated parts are up to date.

The Python blocks of a page of the guide are one program. A block that begins with a file's name is that file, and a
console block runs it: what the page shows below the command is what it prints.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import generated
import pytest
import reference
import torch

import anyattn
import anyattn.api
import anyattn.c_library
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
import anyattn.decoding
import anyattn.explicit
import anyattn.nn
import anyattn.runtime.dispatch
import anyattn.sdpa
from anyattn import cli, compat
from anyattn.bench import plots
from harness.backends import engines
from harness.paths import ROOT

README = ROOT / "README.md"
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
# The packages of these pages no longer support Python 3.10 (requirements/test.txt).
RECENT = {f"docs/use-with/{name}.md" for name in ("diffusers", "onnx", "transformers")}
# What it activates is in torch 2.10 and later.
REGISTRY = hasattr(torch.nn.attention, "restore_flash_attention_impl")
OMITTED = (set() if sys.version_info >= (3, 11) else RECENT) | (
    set() if REGISTRY else {"docs/use-with/pytorch-sdpa.md"}
)
RUN = [name for name in PAGES if name not in OMITTED]


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text); Python with as many empty lines before it as errors need to name the page's line."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCKS.finditer(text):
        language, block = found.groups()
        yield language, "\n" * (text.count("\n", 0, found.start()) + 1) * (language == "python") + block


@pytest.mark.parametrize("block", [text for language, text in blocks(README) if language == "python"])
def test_readme_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.fixture
def _restored() -> Iterator[None]:
    """Nothing that a page activates outlives it, even if it fails."""
    with torch.random.fork_rng():
        yield
    compat.uninstall()
    anyattn.compat.aule.uninstall()
    if REGISTRY:
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    if "anyattn.compat.transformers" in sys.modules:
        anyattn.compat.transformers.uninstall_flash_attention_2()


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("name", RUN)
def test_blocks_of_the_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_links_of_the_guide_have_targets() -> None:
    made = {ROOT / "docs" / page for page in reference.pages()}
    for path in (README, *PAGES.values()):
        for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", BLOCKS.sub("", path.read_text(encoding="utf-8"))):
            file = (path.parent / target).resolve()
            assert target.startswith("https://") or file in made or file.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{path.name}: {target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index() -> None:
    """Check that the index of the site or of the folder links to each page."""
    for name, path in PAGES.items():
        own = PAGES.get(f"{path.parent.relative_to(ROOT).as_posix()}/index.md")
        indices = {PAGES["docs/index.md"], own} - {path, None}
        links = [os.path.relpath(path, index.parent) for index in indices]
        texts = [index.read_text(encoding="utf-8") for index in indices]
        assert name == "docs/index.md" or any(f"]({link})" in text for link, text in zip(links, texts, strict=True)), (
            name
        )


def test_every_block_has_a_known_language() -> None:
    """A block without a language is a formula, a picture, or a command that installs or runs for minutes."""
    for name, path in PAGES.items():
        fences = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        compiled = {"cpp", "bash", "c"} if name.endswith("c-and-cpp.md") else set()  # test_cpp_api.py, or a header
        assert set(fences[::2]) <= {"", "python", "console", "math"} | compiled, name
        assert set(fences[1::2]) <= {""}, name


def test_every_command_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = cli.parsers()[1]
    named = 0
    for path in (README, ROOT / "CONTRIBUTING.md", *PAGES.values()):
        text = path.read_text(encoding="utf-8")
        for name, flags in re.findall(
            r"(?:`|^|-m )anyattn ([a-z]+)(?=`|$|  | -| \w+\.py)((?: --[\w-]+)*)", text, re.MULTILINE
        ):
            known = {flag for action in commands[name]._actions for flag in action.option_strings}
            assert set(flags.split()) <= known, f"{path.name}: anyattn {name}{flags}"
            named += 1
        assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= targets, path.name
    assert named > 20


def test_every_module_that_a_page_imports_has_a_page_of_its_own() -> None:
    code = "\n".join(
        block for path in (README, *PAGES.values()) for language, block in blocks(path) if language == "python"
    )
    imported = set(re.findall(r"^\s*(?:import|from) (anyattn\.[\w.]+)", code, re.MULTILINE))
    inner = {"anyattn.backends.base", "anyattn.definition", "anyattn.runtime"}  # for who writes a backend
    assert len(imported) > 10
    assert {name for name in imported if not name.startswith(tuple(inner))} <= set(reference.MODULES)


@pytest.mark.parametrize(
    "module",
    [
        anyattn,
        anyattn.api,
        anyattn.decoding,
        sys.modules["anyattn.definition.score.trace"],
        anyattn.explicit,
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
        anyattn.c_library,
        anyattn.nn,
        anyattn.runtime.dispatch,
        sys.modules["anyattn.sdpa"],
    ],
    ids=lambda module: module.__name__,
)
def test_docstring_examples_run(module: object) -> None:
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)  # type: ignore[arg-type]
    assert tried > 0
    assert failed == 0


def test_every_public_name_is_documented() -> None:
    for name in anyattn.__all__:
        assert getattr(anyattn, name).__doc__, name


@pytest.mark.parametrize("page", [README, *PAGES.values()], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_generated_parts_are_up_to_date(page: Path) -> None:
    """`make pages` writes them."""
    text = page.read_text(encoding="utf-8")
    if page.name == "features.md" and not {"triton", "vulkan"} <= {engine.backend for engine in engines()}:
        pytest.skip("lists what Triton's interpreter and a Vulkan driver answer")
    assert generated.fill(text, page) == text
    assert text.count("<!-- generated: ") == len(generated.PART.findall(text))


def test_committed_pictures_are_up_to_date() -> None:
    for path, drawing in generated.drawings().items():
        assert path.read_text(encoding="utf-8") == drawing, path
    for name in ("cpu", *plots.PANELS):
        assert generated.source().encode() in (generated.IMAGES / f"{name}.png").read_bytes(), name


def test_readme_is_short_and_starts_with_a_call() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert len(" ".join(lines).split()) <= 1500
    assert lines.index("```python") < 20
