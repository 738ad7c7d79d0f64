"""Other packages' import names: installed, taken back, refused where they are taken, and `anyattn run`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import anyattn
from anyattn import compat
from anyattn.compat import installation

SUBMODULES = {
    "flash_attn": "flash_attn",
    "flash_attn.flash_attn_interface": "flash_attn.flash_attn_interface",
    "flash_attn.bert_padding": "flash_attn.bert_padding",
    "flash_attn.layers.rotary": "flash_attn.layers.rotary",
    "flash_attn.modules.mha": "flash_attn.modules.mha",
    "flash_attn.ops.triton.rotary": "flash_attn.ops.triton.rotary",
    "flash_attn.cute": "flash_attn_4",
    "flash_attn.cute.interface": "flash_attn_4.interface",
    "flash_attn_interface": "flash_attn_3.flash_attn_interface",
    "flash_attn_3.flash_attn_interface": "flash_attn_3.flash_attn_interface",
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    compat.uninstall()
    assert not any(isinstance(finder, installation.Finder) for finder in sys.meta_path)
    assert not [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "aule")]


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called flash_attn that can be imported."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = 'real'\n")
    (tmp_path / "flash_attn" / "bert_padding.py").write_text("here = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_installed_name_is_the_module_itself() -> None:
    with compat.install_flash_attn():
        for name, place in SUBMODULES.items():
            assert find_spec(name) is not None, name
            own = importlib.import_module(f"anyattn.compat.{place}")
            spec = own.__spec__
            assert importlib.import_module(name) is own, name
            assert own.__spec__ is spec and own.__name__ == f"anyattn.compat.{place}"
        import flash_attn

        assert flash_attn.modules.mha.FlashSelfAttention is compat.flash_attn.modules.mha.FlashSelfAttention
        assert flash_attn.__version__ == metadata.version("flash-attn") == metadata.version("flash_attn")
        assert find_spec("flash_attn.losses") is None
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.losses"):
            importlib.import_module("flash_attn.losses")
    assert find_spec("flash_attn") is None
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("flash-attn")


def test_spec_is_found_before_the_first_import() -> None:
    """transformers and others look for the package without importing it."""
    code = (
        "import sys, importlib.util, importlib.metadata\n"
        "from anyattn import compat\n"
        "compat.install_flash_attn()\n"
        "assert importlib.util.find_spec('flash_attn').submodule_search_locations is not None\n"
        "assert 'flash_attn' in importlib.metadata.packages_distributions()\n"
        "assert 'torch' not in sys.modules and 'flash_attn' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_installing_twice_or_nested_changes_nothing() -> None:
    outer = compat.install("flash_attn", "aule")
    assert outer.names == ("flash_attn", "aule")
    with compat.install("aule") as inner:
        assert inner.names == ()
    assert find_spec("aule") is not None  # the inner one had installed nothing
    outer.uninstall()
    outer.uninstall()
    assert find_spec("aule") is None and find_spec("flash_attn") is None
    compat.uninstall("flash_attn")
    assert sys.meta_path.count(installation._finder) == 0


def test_real_package_takes_precedence_unless_forced(real: Path) -> None:
    with pytest.raises(ImportError, match=r"flash_attn is importable from .*force=True"):
        compat.install("aule", "flash_attn")
    assert find_spec("aule") is None  # nothing was installed
    import flash_attn
    import flash_attn.bert_padding

    assert flash_attn.__version__ == "real"
    with compat.install_flash_attn(force=True):
        served = importlib.import_module("flash_attn.bert_padding")
        assert served is compat.flash_attn.bert_padding and importlib.import_module("flash_attn") is compat.flash_attn
    assert importlib.import_module("flash_attn") is flash_attn
    assert importlib.import_module("flash_attn.bert_padding").here
    for name in ("flash_attn.bert_padding", "flash_attn"):
        del sys.modules[name]


def test_module_without_a_spec_counts_as_a_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = type(sys)("aule")
    monkeypatch.setitem(sys.modules, "aule", stub)
    with pytest.raises(ImportError, match="aule"):
        compat.install("aule")
    with compat.install("aule", force=True):
        assert importlib.import_module("aule").__name__ == "anyattn.compat.aule"
    assert sys.modules.pop("aule") is stub


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'numpy'"):
        compat.install("aule", "numpy")


PROGRAM = """\
import sys
from pathlib import Path
import beside
import aule
print(__name__, Path(sys.argv[0]).name, sys.argv[1:], aule.__name__)
if sys.argv[1:] == ["raise"]:
    raise KeyError("mine")
sys.exit(7)
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """`python -m anyattn run ...`, in another folder, of the package that is being tested."""
    source = str(Path(anyattn.__file__).parent.parent)
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "anyattn", "run", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("")
    return tmp_path


def test_run_executes_a_script_with_its_folder_on_the_path(
    program: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Run from another folder, and find modules next to the script as `python script.py` does."""
    result = run(tmp_path_factory.mktemp("elsewhere"), str(program / "program.py"), "--force", "-m")
    assert result.returncode == 7, result.stderr
    assert result.stdout == "__main__ program.py ['--force', '-m'] anyattn.compat.aule\n"


def test_run_reports_the_error_of_a_failing_module(program: Path) -> None:
    result = run(program, "--as", "flash_attn", "--as", "aule", "-m", "program", "raise")
    assert result.returncode == 1 and "KeyError: 'mine'" in result.stderr
    assert result.stdout == "__main__ program.py ['raise'] anyattn.compat.aule\n"
    assert "No module named 'aule'" in run(program, "--as", "flash_attn", "program.py").stderr


def test_run_serves_a_program_that_imports_flash_attn(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import torch\n"
        "from flash_attn import flash_attn_func\n"
        "from flash_attn.bert_padding import unpad_input\n"
        "x = torch.ones(1, 4, 2, 8, requires_grad=True)\n"
        "flash_attn_func(x, x, x, causal=True).sum().backward()\n"
        "print(x.grad.shape)\n"
    )
    result = run(tmp_path, "program.py")
    assert (result.returncode, result.stdout) == (0, "torch.Size([1, 4, 2, 8])\n"), result.stderr


def test_run_refuses_names_of_installed_packages(program: Path, real: Path) -> None:
    """Check a folder that contains a package flash_attn, and then also a module aule."""
    taken = run(program, "program.py")
    assert taken.returncode == 2 and "flash_attn is importable" in taken.stderr and not taken.stdout
    (program / "aule.py").write_text("")
    assert "aule is importable" in run(program, "--as", "aule", "program.py").stderr
    forced = run(program, "--force", "program.py")
    assert forced.returncode == 7 and "anyattn.compat" in forced.stdout, forced.stderr
    nothing = run(program)
    assert nothing.returncode == 2 and "script" in nothing.stderr
    assert "--as" in run(program, "--as", "numpy", "program.py").stderr


def test_run_does_not_replace_modules_of_the_program(program: Path) -> None:
    """A file of its own called flash_attention is what the program imports."""
    (program / "flash_attention.py").write_text("mine = True\n")
    (program / "other.py").write_text("import flash_attention, aule; assert flash_attention.mine\n")
    result = run(program, "other.py")
    assert result.returncode == 0, result.stderr
