"""Contracts of the imports (pyproject.toml), and the modules that a fresh process loads."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import anyattn
from harness.paths import ROOT
from harness.processes import fresh

PACKAGE = Path(anyattn.__file__).parent
CONTRACTS = ROOT / "pyproject.toml"
HOOK = "anyattn._pyinstaller.hook-anyattn"  # PyInstaller alone runs it
# Parts that may use any package, inside functions.
TOP = (HOOK, "anyattn.bench", "anyattn.cli", "anyattn.compat", "anyattn.testing")
# Modules that import torch, JAX or Triton when they are imported.
ON_TORCH = (
    *("anyattn.compat", "anyattn.distributed", "anyattn.frameworks.torch", "anyattn.frameworks.torch_tools"),
    "anyattn.nn",
)
ON_JAX = ("anyattn.frameworks.jax",)
ON_TRITON = ("anyattn.backends.triton",)
REGISTERS = "anyattn.compat.transformers"  # with the package it stands for, when it is imported


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package and its contracts."""
    shutil.copytree(PACKAGE, tmp_path / "anyattn", ignore=shutil.ignore_patterns("examples", "*.so", "__pycache__"))
    shutil.copy(CONTRACTS, tmp_path)
    return tmp_path


def lint(folder: Path) -> tuple[int, str]:
    """Check the contracts of the package in the folder: return the exit status and what import-linter prints."""
    command = "from importlinter.cli import lint_imports_command as lint; lint()"
    arguments = [sys.executable, "-c", command, "--no-cache"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder)
    return result.returncode, result.stdout


def test_contracts_are_kept(copy: Path) -> None:
    status, text = lint(copy)
    assert status == 0, text


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("frameworks/numpy.py", "def f(): from .. import api", "The parts of the package are layers"),
        ("definition/mask.py", "from ..config import settings", "The parts of the package are layers"),
        ("rooms.py", "", "The parts of the package are layers"),
        ("backends/triton/tuning.py", "from . import backend", "No cycle inside any package"),
        ("definition/mask.py", "def f(): from . import problem", "No cycle inside any package"),
        ("backends/numpy/tiles.py", "from ..cpu import layout", "Backends do not import each other"),
        ("api.py", "from .backends.cpu import library", "Public functions reach a backend through runtime"),
        (
            "compat/onnx.py",
            "from ..frameworks import numpy",
            "Compat uses the doors of the frameworks",
        ),
        ("frameworks/__init__.py", "import importlib", "Frameworks are imported by statements"),
        ("runtime/execute.py", "def f(): import torch", "PyTorch stays where it is the subject"),
        ("frameworks/numpy.py", "def f(): import jax", "JAX stays where it is the subject"),
        ("frameworks/torch/ops.py", "import triton", "Triton stays in its backend"),
    ],
)
def test_forbidden_imports_break_their_contract(copy: Path, module: str, line: str, contract: str) -> None:
    """One forbidden import breaks the contract that forbids it."""
    with (copy / "anyattn" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    status, text = lint(copy)
    assert status == 1, text
    assert f"{contract} BROKEN" in text, text


def third_parties() -> dict[str, set[str]]:
    """Return every package outside the standard library that a module imports anywhere, and these modules."""
    graph = grimp.build_graph(
        "anyattn", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    outside = {name for name in graph.modules if graph.is_module_squashed(name)} - set(sys.stdlib_module_names)
    return {name: graph.find_modules_that_directly_import(name) for name in outside}


def test_third_party_packages_are_imported_only_where_allowed() -> None:
    """NumPy everywhere; torch, JAX and Triton where their contracts allow them; every other package in TOP.

    The CPU backend uses threadpoolctl if it is installed, because programs that limit threads do not know of anyattn.
    """
    for name, modules in third_parties().items():
        top = (*TOP, "anyattn.backends.cpu.threadpool") if name == "threadpoolctl" else TOP
        wrong = [module for module in modules if not module.startswith(top)]
        assert name in ("numpy", "torch", "jax", "triton") or not wrong, f"{wrong} import {name}"


@pytest.mark.parametrize("package", ["numpy", "torch", "jax", "triton"])
def test_optional_packages_are_not_imported_before_a_call(package: str) -> None:
    """Each module can be imported with NumPy alone, or with the one package it is about in addition."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    parts = {"numpy": ("anyattn",), "torch": ON_TORCH, "jax": ON_JAX, "triton": ON_TRITON}[package]
    modules = sorted(grimp.build_graph("anyattn", cache_dir=None).modules)
    wanted = [name for name in modules if name.startswith(parts) and not name.startswith((REGISTERS, HOOK))]
    if package == "numpy":
        wanted = [name for name in wanted if not name.startswith((*ON_TORCH, *ON_JAX, *ON_TRITON))]
    needed = {"jax": {"ml_dtypes"}}.get(package, set())  # by the package itself
    missing = sorted(third_parties().keys() - {"numpy", package} - needed)
    result = fresh(
        "import sys; from importlib import import_module\n"
        f"sys.modules |= dict.fromkeys({missing})\n"
        f"for name in {wanted}: import_module(name)\n"
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr


def test_import_loads_only_numpy_and_prints_nothing() -> None:
    result = fresh(
        "import sys, numpy; before = set(sys.modules); import anyattn\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new - {'numpy'} == {'anyattn'}, new\n"
        "backends = {name for name in sys.modules if name.startswith('anyattn.backends.')}\n"
        "assert backends <= {'anyattn.backends.base'}, backends\n"
        "assert 'anyattn.frameworks.torch' not in sys.modules and 'torch' not in sys.modules\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_checking_a_small_problem_imports_no_vulkan_driver() -> None:
    """Every automatic call asks whether it avoids the problem; that needs neither a device nor anything slow."""
    result = fresh(
        "import sys, numpy; before = set(sys.modules)\n"
        "from anyattn.definition.options import Options; from anyattn.definition.problem import contiguous\n"
        "from anyattn.definition.validate import make_problem; from anyattn.runtime import dispatch\n"
        "x = contiguous((1, 4, 2, 8), 'float32')\n"
        "small = make_problem({'q': x, 'k': x, 'v': x}, Options())\n"
        "assert dispatch.get('vulkan').avoids(small)\n"
        "slow = {'dataclasses', 'json', 'pathlib', 'anyattn.definition.reference'} & (set(sys.modules) - before)\n"
        "assert not slow, slow\n"
        "vulkan = {name for name in sys.modules if name.startswith('anyattn.backends.vulkan.')}\n"
        "assert vulkan == {'anyattn.backends.vulkan.backend', 'anyattn.backends.vulkan.offload'}, vulkan\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_numpy_call_never_imports_torch() -> None:
    result = fresh(
        "import sys; sys.modules |= dict.fromkeys(('torch', 'jax', 'ml_dtypes'))\n"
        "import numpy as np, anyattn\n"
        "x = np.ones((1, 4, 2, 8), np.float32)\n"
        "assert anyattn.attention(x, x, x, causal=True, backend='numpy').shape == x.shape\n"
        "out, lse = anyattn.attention_forward(x, x, x, backend='numpy')\n"
        "anyattn.attention_backward(x, x, x, x, out, lse, backend='numpy')\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_public_modules_are_attributes_after_one_import() -> None:
    result = fresh("import anyattn; anyattn.settings.reload(); anyattn.vulkan.DeviceArray; anyattn.compat; anyattn.nn")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_public_name_exists() -> None:
    for name in anyattn.__all__:
        assert getattr(anyattn, name).__doc__, name
    assert sorted(anyattn.__all__) == list(anyattn.__all__)


def test_broken_library_is_reported_as_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"this is no library")
    code = (
        f"import os; os.environ['ANYATTN_LIBRARY'] = {str(broken)!r}\n"
        "import warnings, numpy as np, anyattn\n"
        "from anyattn.runtime import dispatch\n"
        "x = np.ones((1, 4, 2, 8), np.float32)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): anyattn.attention(x, x, x)\n"
        "assert len(caught) == 1 and caught[0].category is RuntimeWarning, caught\n"
        "assert 'broken.so' in str(caught[0].message), caught[0].message\n"
        "assert 'broken.so' in dispatch.get('cpu').available()\n"
        "assert 'cpu' not in anyattn.get_available_backends()\n"
        "try: anyattn.attention(x, x, x, backend='cpu')\n"
        "except anyattn.UnsupportedProblem as error: assert 'broken.so' in str(error)\n"
        "else: raise AssertionError('a named backend fell back')\n"
    )
    result = fresh(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_required_backend_that_is_missing_raises(tmp_path: Path) -> None:
    code = (
        f"import os; os.environ |= {{'ANYATTN_LIBRARY': {str(tmp_path / 'absent.so')!r}, 'ANYATTN_REQUIRE': 'cpu'}}\n"
        "import numpy as np, anyattn\n"
        "x = np.ones((1, 4, 2, 8), np.float32)\n"
        "try: anyattn.attention(x, x, x)\n"
        "except RuntimeError as error: assert 'ANYATTN_REQUIRE' in str(error) and 'cpu' in str(error)\n"
        "else: raise AssertionError('nothing was raised')\n"
    )
    result = fresh(code)
    assert (result.returncode, result.stderr) == (0, "")
