"""Results of an install: with a compiler one wheel for every Python, without one a pure wheel that works."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from harness.paths import ROOT

SOURCES = ("src", "native", "examples", "scripts", "pyproject.toml", "README.md", "LICENSE")
pytest.importorskip("scikit_build_core")


def sources(folder: Path) -> Path:
    """Return a copy of what the build reads."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
        else:
            shutil.copy(path, source / name)
    return source


def pip(*arguments: str | Path, **environment: str) -> str:
    """Return what a command of pip prints that succeeds."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this environment
    result = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env={**os.environ, "PATH": tools, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def wheel(folder: Path, **environment: str) -> Path:
    """Return the wheel that pip builds from a copy of the sources, without the network."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    pip("wheel", sources(folder), *options, **environment)
    (built,) = folder.glob("*.whl")
    return built


def run_installed(built: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code that imports the package from the wheel's contents alone."""
    target = folder / "installed"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(target)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANYATTN_", "PYTHONPATH"))}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{code}"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


CALL = (
    "import warnings, numpy as np, anyattn\n"
    "x = np.ones((1, 4, 2, 8), np.float32)\n"
    "with warnings.catch_warnings(record=True) as caught:\n"
    "    warnings.simplefilter('always')\n"
    "    for _ in range(3):\n"
    "        out, lse = anyattn.attention_forward(x, x, x, causal=True)\n"
    "        anyattn.attention_backward(x, x, x, x, out, lse, causal=True)\n"
    "print(anyattn.get_available_backends(), anyattn.__file__)\n"
    "for warning in caught: print(warning.message)\n"
)


def test_install_without_a_compiler_gives_a_pure_wheel(tmp_path: Path) -> None:
    """The install succeeds, NumPy serves, the first call warns once with the cause, and `anyattn info` says it too."""
    built = wheel(tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".dll", ".dylib"))]
    result = run_installed(built, tmp_path, CALL)
    assert result.returncode == 0, result.stderr
    first, *warnings = result.stdout.splitlines()
    assert first.startswith("['numpy']") and str(tmp_path) in first
    assert len(warnings) == 1 and "not installed" in warnings[0] and "--no-cache-dir" in warnings[0]
    info = run_installed(built, tmp_path, "from anyattn.cli import main; main(['info'])")
    assert info.returncode == 0 and "compiler" in info.stdout


def test_metadata_needs_no_compiler(tmp_path: Path) -> None:
    """A resolver that asks for metadata alone, for example pip's --dry-run, starts no compiler."""
    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\nexit 1\n')
    compiler.chmod(0o755)
    options = ("--dry-run", "--ignore-installed", "--no-deps", "--no-build-isolation", "--no-index")
    result = pip("install", *options, sources(tmp_path), CC=str(compiler), CXX=str(compiler))
    assert "Would install anyattn" in result
    assert not calls.exists()


@pytest.mark.full
def test_install_with_a_compiler_gives_one_wheel_per_platform(tmp_path: Path) -> None:
    """One wheel per platform for every Python, with the library, the header and the CMake configuration."""
    built = wheel(tmp_path)
    assert "-py3-none-" in built.name and not built.name.endswith("-any.whl")
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
    parts = ("lib/", "include/anyattn.h", "include/anyattn.hpp", "anyattnConfig.cmake", "anyattnConfigVersion.cmake")
    for part in (*parts, "examples/cpp/attention.cpp", "py.typed"):
        assert [name for name in names if part in name], part
    result = run_installed(built, tmp_path, CALL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("['cpu', 'numpy']") and len(result.stdout.splitlines()) == 1
