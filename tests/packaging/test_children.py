"""Processes that a program below `anyattn run` starts find the names too, and others are left alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from anyattn.compat import children
from harness.processes import run_python

IMPORT = "import flash_attn, importlib.metadata\nprint(flash_attn.__name__, importlib.metadata.version('flash-attn'))\n"
SERVED = "anyattn.compat.flash_attn 2.8.3\n"
POOL = """
import multiprocessing, sys

def child(_):
    import flash_attn
    return flash_attn.__name__

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(*pool.map(child, [0]))
"""
STARTS = "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)\n"
ABSENT = "try: import flash_attn\nexcept ModuleNotFoundError as error: print(error, error.name)\n"
PATHS = "import sys, os; print([name for name in sys.modules if name.startswith('anyattn')], *sys.path, sep=os.linesep)"


def below_run(folder: Path, program: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program by `anyattn run` in a folder of its own."""
    path = folder / "program.py"
    path.write_text(program, encoding="utf-8")
    return run_python("-m", "anyattn", "run", path, *arguments, **variables)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing_children_find_the_names(tmp_path: Path, method: str) -> None:
    result = below_run(tmp_path, POOL, method)
    assert (result.stdout, result.returncode) == ("anyattn.compat.flash_attn\n", 0), result.stderr


def test_child_processes_and_their_children_find_the_names(tmp_path: Path) -> None:
    program = tmp_path / "starts.py"
    program.write_text(STARTS, encoding="utf-8")
    result = below_run(tmp_path, STARTS, program, program, "-c", IMPORT)
    assert (result.stdout, result.stderr) == (SERVED, "")


def test_metadata_and_specs_are_found_before_the_import(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, importlib.metadata as m\nprint(m.version('flash_attn'), u.find_spec('flash_attn'))"
    )
    result = below_run(tmp_path, STARTS, "-c", code)
    assert result.stdout.startswith("2.8.3 ModuleSpec(name='flash_attn'"), result.stderr
    code = "import importlib.util as u, sys\nprint(u.find_spec('flash_attn') is not None, 'anyattn' in sys.modules)"
    assert below_run(tmp_path, STARTS, "-c", code).stdout == "True False\n"


def test_torchrun_workers_find_the_names(tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text("import os\nfrom flash_attn import flash_attn_func\nprint('rank', os.environ['RANK'])\n")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program)
    result = run_python("-m", "anyattn", "run", *command)
    assert result.returncode == 0, result.stderr
    assert "rank 0" in result.stdout and "rank 1" in result.stdout


def test_process_without_these_imports_does_not_load_anyattn(tmp_path: Path) -> None:
    result = below_run(tmp_path, STARTS, "-c", PATHS)
    modules, *paths = result.stdout.splitlines()
    assert (modules, result.stderr) == ("[]", "")
    assert paths and children.FOLDER not in paths


def test_sitecustomize_of_the_user_still_runs(tmp_path: Path) -> None:
    user = tmp_path / "user"
    user.mkdir()
    (user / "sitecustomize.py").write_text("import sys\nsys.greeting = 'hello'\n")
    code = f"import sys, sitecustomize\nprint(sys.greeting, sitecustomize.__file__)\n{IMPORT}"
    with children.served(["flash_attn"], force=False):
        result = run_python("-c", code, PYTHONPATH=os.pathsep.join([children.FOLDER, str(user)]))
    assert result.stdout.startswith(f"hello {user}") and SERVED in result.stdout, result.stderr


@pytest.mark.parametrize("value", ["absent 0 flash_attn=flash_attn=flash_attn", "nonsense", ""])
def test_process_without_anyattn_raises_the_usual_error(value: str) -> None:
    result = run_python("-c", ABSENT, PYTHONPATH=children.FOLDER, **{children.VARIABLE: value})
    assert (result.stdout, result.stderr) == ("No module named 'flash_attn' flash_attn\n", "")


@pytest.mark.parametrize("force", [False, True])
def test_installed_package_of_the_name_is_replaced_only_by_force(tmp_path: Path, force: bool) -> None:
    (tmp_path / "flash_attn.py").touch()
    with children.served(["flash_attn"], force):
        result = run_python(
            "-c",
            "import flash_attn; print(flash_attn.__name__)",
            PYTHONPATH=os.pathsep.join([children.FOLDER, str(tmp_path)]),
        )
    assert result.stdout == ("anyattn.compat.flash_attn\n" if force else "flash_attn\n"), result.stderr


def test_threads_that_import_at_once_all_find_the_names(tmp_path: Path) -> None:
    code = (
        "import threading, importlib\n"
        "names = ('flash_attn', 'flash_attn_interface', 'flash_attn_3', 'flash_attn.cute') * 4\n"
        "threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    code = f"import faulthandler; faulthandler.dump_traceback_later(60, exit=True)\n{code}"
    result = below_run(tmp_path, STARTS, "-c", code)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "/somewhere:/else"):
        if value is None:
            monkeypatch.delenv("PYTHONPATH", raising=False)
        else:
            monkeypatch.setenv("PYTHONPATH", value)
        before = dict(os.environ)
        with children.served(["flash_attn"], force=False):
            assert os.environ["PYTHONPATH"].startswith(children.FOLDER)
            with children.served(["flash_attn"], force=True):
                assert os.environ["PYTHONPATH"].count(children.FOLDER) == 1
        assert dict(os.environ) == before
