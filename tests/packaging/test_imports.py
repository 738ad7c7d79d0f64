"""Who may import whom, and what a fresh process sees."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anyattn
from harness.processes import fresh

ROOT = Path(anyattn.__file__).parent
# Each part of the package, and the parts it may import; "lazy" ones only inside a function.
ALLOWED = {
    "definition": set(),
    "config": set(),
    "settings": {"config"},
    "backends": {"definition", "config"},
    "runtime": {"definition", "config", "backends"},
    "frameworks": {"definition", "config", "backends", "runtime"},
    "c_library": {"backends"},
    "vulkan": {"backends"},
    "introspection": {"api", "definition", "runtime"},
    "api": {"definition", "frameworks"},
    "sdpa": {"definition", "frameworks"},
}
LAZY = {
    *[("runtime", f"backends.{name}") for name in ("cpu", "triton", "vulkan", "numpy")],
    ("api", "frameworks."),
    ("sdpa", "frameworks"),
    ("c_library", "backends.cpu"),
}
# May import any part; nothing below imports them.
TOP = {"__init__", "__main__", "cli", "bench", "compat", "nn"}
NUMPY_ONLY = {*ALLOWED, "__init__"} - {"frameworks"}


def modules() -> list[Path]:
    """The wheel carries examples/ beside the modules: scripts that import what they like, and that nothing imports."""
    return sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "examples")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(absolute name, inside a function or TYPE_CHECKING, line) of everything that a module imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["anyattn", *path.relative_to(ROOT).parts[:-1]]

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            inside = inside or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, inside, child.lineno
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                prefix = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield f"{prefix}.{alias.name}", inside, child.lineno
            else:
                yield from visit(child, inside)

    yield from visit(tree, False)


def part_of(name: str) -> str:
    return name.removeprefix("anyattn.").split(".")[0]


def test_every_part_has_a_rule() -> None:
    """A new module or folder is a decision about the import direction: write it down above."""
    parts = {name_of(path).split(".")[0] for path in modules()}
    assert parts <= set(ALLOWED) | TOP


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    own, name = name_of(path).split(".")[0], name_of(path)
    for target, lazy, line in imports(path):
        if not target.startswith("anyattn"):
            continue
        other = part_of(target)
        where = f"{name}:{line} imports {target}"
        if own not in TOP and other != own:
            assert other in ALLOWED[own], where
        if own == other == "backends" and name.count(".") and target.count(".") > 1:
            assert target.split(".")[2] in {name.split(".")[1], "base"}, f"{where}: backends never import each other"
        if any(own == a and target.startswith(f"anyattn.{b}") for a, b in LAZY):
            assert lazy, f"{where}: only inside a function"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_third_parties(path: Path) -> None:
    """NumPy and the standard library; torch where it is the subject; others only inside functions of the top.

    The Triton backend imports Triton, and torch, through which it reaches a GPU, inside functions.
    """
    own = name_of(path).split(".")[0]
    for target, lazy, line in imports(path):
        package = target.split(".")[0]
        if package in sys.stdlib_module_names or package in ("anyattn", "numpy", "__future__"):
            continue
        where = f"{name_of(path)}:{line} imports {target}"
        if name_of(path).startswith("frameworks.torch"):
            assert package == "torch", where
        elif name_of(path).startswith("backends.triton"):
            assert package == "triton" or (package == "torch" and lazy), where
        elif own in ("compat", "nn") and package == "torch":
            continue  # these modules stand for packages that are built on torch, or are its layers
        else:
            assert lazy and own in TOP, where


def test_frameworks_are_imported_by_statements() -> None:
    """torch.compile(fullgraph=True) traces an import statement; importlib would break the graph."""
    for path in modules():
        if name_of(path).split(".")[0] in ("api", "arguments", "frameworks", "dispatch"):
            assert not any(part_of(target) == "importlib" for target, _, _ in imports(path)), name_of(path)


def test_import_loads_numpy_alone_and_prints_nothing() -> None:
    result = fresh(
        "import sys, numpy; before = set(sys.modules); import anyattn\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new - {'numpy'} == {'anyattn'}, new\n"
        "backends = {name for name in sys.modules if name.startswith('anyattn.backends.')}\n"
        "assert backends <= {'anyattn.backends.base'}, backends\n"
        "assert 'anyattn.frameworks.torch' not in sys.modules and 'torch' not in sys.modules\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_asking_vulkan_about_a_small_problem_imports_no_driver() -> None:
    """Every automatic call asks whether it avoids the problem; that needs neither a device nor anything slow."""
    result = fresh(
        "import sys, numpy; before = set(sys.modules)\n"
        "from anyattn.definition import problem; from anyattn.runtime import dispatch\n"
        "x = problem.Array((1, 4, 2, 8), (64, 16, 8, 1), 'float32')\n"
        "small = problem.make_problem({'q': x, 'k': x, 'v': x}, problem.Options())\n"
        "assert dispatch.get('vulkan').avoids(small)\n"
        "slow = {'dataclasses', 'json', 'pathlib', 'anyattn.definition.reference'} & (set(sys.modules) - before)\n"
        "assert not slow, slow\n"
        "vulkan = {name for name in sys.modules if name.startswith('anyattn.backends.vulkan.')}\n"
        "assert vulkan == {'anyattn.backends.vulkan.backend', 'anyattn.backends.vulkan.offload'}, vulkan\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_numpy_call_never_imports_torch() -> None:
    result = fresh(
        "import sys; sys.modules['torch'] = None; sys.modules['ml_dtypes'] = None\n"
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


def test_a_broken_library_is_a_reason_and_not_a_crash(tmp_path: Path) -> None:
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
