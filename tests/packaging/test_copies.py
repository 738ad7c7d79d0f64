"""Copies of the package work, or say what is missing: vendored, in a zip archive, frozen by PyInstaller."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import anyattn
from harness.processes import run_python

PACKAGE = Path(anyattn.__file__).parent
INPUT = "import numpy as np\nx = np.ones((1, 8, 1, 16), np.float32)\n"
CALL = f"{INPUT}anyattn.attention(x, x, x)\nprint(anyattn.explain(x, x, x).chosen, anyattn.__file__)\n"
FROZEN = f"import anyattn\n{CALL}from anyattn.backends.vulkan.pipeline import binary\nassert binary('forward_f32')\n"
# Packages of the test environment that PyInstaller would follow and that the frozen program does not need.
LARGE = ("torch", "triton", "matplotlib", "rich", "threadpoolctl", "IPython", "PIL", "onnx", "transformers")


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """Return a folder with the package host._vendor.anyattn."""
    vendor = tmp_path / "host" / "_vendor"
    shutil.copytree(PACKAGE, vendor / "anyattn", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (vendor.parent, vendor):
        (folder / "__init__.py").touch()
    return tmp_path


def archive(folder: Path, *without: str) -> Path:
    """Return a zip archive of the package without these folders."""
    path = folder / "app.zip"
    with zipfile.ZipFile(path, "w") as file:
        for source in PACKAGE.rglob("*"):
            inside = source.relative_to(PACKAGE)
            if source.is_file() and "__pycache__" not in inside.parts and inside.parts[0] not in without:
                file.write(source, f"anyattn/{inside.as_posix()}")
    return path


def run(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that finds packages of the folder first; RuntimeWarnings are errors."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return run_python("-W", "error::RuntimeWarning", "-c", code, without=("ANYATTN_",), **variables)


def test_a_vendored_copy_finds_its_native_library(vendored: Path) -> None:
    result = run(vendored, f"from host._vendor import anyattn\n{CALL}")
    assert result.stdout.startswith("cpu ") and str(vendored) in result.stdout, result.stderr


def test_vendored_and_installed_copies_work_in_one_process(vendored: Path) -> None:
    code = (
        "import torch, anyattn, threadpoolctl\n"
        "from host._vendor import anyattn as other\n"
        "x = torch.ones(1, 8, 2, 16, requires_grad=True)\n"
        "for package in (anyattn, other):\n"
        "    compiled = torch.compile(lambda x: package.attention(x, x, x), fullgraph=True, backend='aot_eager')\n"
        "    compiled(x).sum().backward()\n"
        "    package.compat.install_flash_attn(force=True).uninstall()\n"
        "torch.ops.anyattn.forward, torch.ops.host__vendor_anyattn.forward\n"
        "import anyattn.compat.torch, host._vendor.anyattn.compat.torch\n"
        "pools = [pool for pool in threadpoolctl.threadpool_info() if pool['user_api'] == 'anyattn']\n"
        "assert len({pool['filepath'] for pool in pools}) == 2 == len(pools), pools\n"
    )
    result = run(vendored, code)
    assert result.returncode == 0, result.stderr


def test_copy_without_its_library_is_reported(vendored: Path) -> None:
    shutil.rmtree(vendored / "host/_vendor/anyattn/lib")
    code = f"from host._vendor import anyattn\n{INPUT}print(anyattn.explain(x, x, x, backend='cpu').reasons['cpu'])"
    result = run(vendored, code)
    assert "is not in this copy of the package" in result.stdout and "folder lib" in result.stdout, result.stderr


def test_package_works_from_a_zip_archive(tmp_path: Path) -> None:
    """The library is unpacked into the cache folder, and the shaders are read where they are."""
    cache = tmp_path / "cache"
    code = f"import anyattn\n{CALL}from anyattn.backends.vulkan.pipeline import binary\nassert binary('forward_f32')\n"
    for _ in range(2):
        result = run(archive(tmp_path), code, ANYATTN_CACHE=str(cache))
        assert result.stdout.startswith("cpu ") and "app.zip" in result.stdout, result.stderr
        (unpacked,) = cache.glob("*anyattn*")
        assert unpacked.read_bytes() == Path(anyattn.get_library()).read_bytes()


def test_an_archive_does_not_load_a_file_with_other_content(tmp_path: Path) -> None:
    cache, file = tmp_path / "cache", archive(tmp_path)
    run(file, f"import anyattn\n{CALL}", ANYATTN_CACHE=str(cache))
    (unpacked,) = cache.glob("*anyattn*")
    unpacked.write_bytes(b"something else")
    result = run(file, f"import anyattn\n{CALL}", ANYATTN_CACHE=str(cache))
    assert result.stdout.startswith("cpu "), result.stderr


@pytest.mark.parametrize(
    ("without", "cache", "reason"),
    [
        ((), "app.zip/cache", "cannot be written to the cache folder"),
        (("lib", "include"), "cache", "is not in the archive"),
    ],
)
def test_archive_reports_the_true_reason(tmp_path: Path, without: tuple[str, ...], cache: str, reason: str) -> None:
    code = (
        f"import anyattn\n{INPUT}print(*anyattn.explain(x, x, x, backend='cpu').reasons['cpu'])\n"
        "try: anyattn.get_include()\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = run(archive(tmp_path, *without), code, ANYATTN_CACHE=str(tmp_path / cache))
    assert reason in result.stdout and "compilers cannot read the headers" in result.stdout, result.stdout
    assert "C++ compiler was found" not in result.stdout


def test_a_frozen_program_without_the_library_names_the_hook(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "anyattn", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    code = f"sys.frozen = True\nimport anyattn\n{INPUT}print(anyattn.explain(x, x, x, backend='cpu').reasons['cpu'])"
    result = run(tmp_path, code)
    assert "not in this frozen program" in result.stdout and "hook" in result.stdout, result.stderr


def test_the_hook_of_pyinstaller_collects_what_is_read_by_name() -> None:
    (entry,) = (entry for entry in entry_points(group="pyinstaller40") if entry.value.startswith("anyattn."))
    (folder,) = entry.load()()
    hook = runpy.run_path(f"{folder}/hook-anyattn.py")
    assert {Path(source).name for source, _ in hook["binaries"]} == {Path(anyattn.get_library()).name}
    assert {inside for _, inside in hook["binaries"]} == {"anyattn/lib"}
    assert [Path(source).name for source, _ in hook["datas"]] == ["shaders.tar.xz"]
    assert {"anyattn.introspection", "anyattn.compat.flash_attn", "anyattn.nn"} <= set(hook["hiddenimports"])


@pytest.mark.full
def test_frozen_program_contains_library_and_shaders(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FROZEN, encoding="utf-8")
    folders = [f"--{name}path={tmp_path / name}" for name in ("dist", "work", "spec")]
    excluded = [f"--exclude-module={name}" for name in LARGE]
    frozen = run_python("-m", "PyInstaller", "--log-level=ERROR", *folders, *excluded, program)
    assert frozen.returncode == 0, frozen.stderr
    executable = tmp_path / "dist" / "program" / ("program.exe" if sys.platform == "win32" else "program")
    result = subprocess.run([executable], capture_output=True, text=True, check=False, timeout=600)
    assert result.stdout.startswith("cpu ") and not result.stderr, result.stderr
