"""C and C++ projects on the installed package: they find headers and library, compile, link and run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anyattn
from harness.paths import ROOT

EXAMPLES = ROOT / "examples" / "cpp"
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")
C, CXX = os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")
TOOLS = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # cmake is among them
COMPILERS = {"c": [C], "c++": [CXX]}
for language, other in (("c", "clang"), ("c++", "clang++")):
    if shutil.which(other) and COMPILERS[language] != [other]:
        COMPILERS[language].append(other)
STANDARDS = [
    *[("c", compiler, standard) for compiler in COMPILERS["c"] for standard in ("c99", "c11", "c17")],
    *[("c++", compiler, standard) for compiler in COMPILERS["c++"] for standard in ("c++17", "c++20")],
]


def run(*command: str | Path, **environment: str) -> str:
    """Run a command, which must succeed. Return its output."""
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def link() -> list[str]:
    """Return the arguments after the source file, as in the first lines of the examples."""
    library = Path(anyattn.get_library())
    return ["-I", anyattn.get_include(), str(library), f"-Wl,-rpath,{library.parent}", "-lm"]


def test_get_include_and_get_library_return_existing_files() -> None:
    include = Path(anyattn.get_include())
    assert (include / "anyattn.h").is_file() and (include / "anyattn.hpp").is_file()
    assert Path(anyattn.get_library()).is_file()


PRINTED = {
    "attention.c": "4 heads over 3: invalid dimension",
    "attention.cpp": "all as it should be",
    "generate.cpp": "all tokens equal those of the whole sequence",
}


def compiled(source: Path, compiler: str, standard: str, program: Path) -> Path:
    run(*compiler.split(), f"-std={standard}", *STRICT, "-O1", source, *link(), "-o", program)
    return program


@pytest.mark.parametrize(("language", "compiler", "standard"), STANDARDS)
def test_examples_compile_and_print_the_expected_lines(
    language: str, compiler: str, standard: str, tmp_path: Path
) -> None:
    source = "attention.c" if language == "c" else "attention.cpp"
    assert PRINTED[source] in run(compiled(EXAMPLES / source, compiler, standard, tmp_path / "attention"))


@pytest.mark.parametrize("compiler", COMPILERS["c++"])
def test_generation_example_compiles_and_prints_the_expected_lines(compiler: str, tmp_path: Path) -> None:
    assert PRINTED["generate.cpp"] in run(compiled(EXAMPLES / "generate.cpp", compiler, "c++17", tmp_path / "generate"))


@pytest.mark.parametrize("header", ["anyattn.h", "anyattn.hpp", "anyattn_xla.h"])
def test_headers_are_self_contained(header: str, tmp_path: Path) -> None:
    """Included first and from two files of one program, in C++ either way."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.cpp").write_text(
            f"#include <{header}>\n#include <{header}>\nint {name}() {{ return 0; }}\n"
        )
    (tmp_path / "main.cpp").write_text("int one();\nint two();\nint main() { return one() + two(); }\n")
    sources = [tmp_path / f"{name}.cpp" for name in ("one", "two", "main")]
    program = tmp_path / "program"
    run(*CXX.split(), "-std=c++17", *STRICT, *sources, *link(), "-o", program)
    run(program)


def test_program_of_the_documentation_compiles_and_runs(tmp_path: Path) -> None:
    """Compile the program of the page by the commands of the page."""
    page = (ROOT / "docs/use-with/c-and-cpp.md").read_text(encoding="utf-8")
    blocks = {language: re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) for language in ("cpp", "bash")}
    (program,), (commands,) = blocks["cpp"], blocks["bash"]
    (tmp_path / "program.cpp").write_text(program)
    run("bash", "-euc", f"cd {shlex.quote(str(tmp_path))}\n{commands}\n./program", **TOOLS)


def configure(source: Path, build: Path) -> subprocess.CompletedProcess[str]:
    """Configure a project with CMake, as the first line of the example shows."""
    command = ["cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={anyattn.get_include()}/.."]
    return subprocess.run(command, env=TOOLS, capture_output=True, text=True, check=False, timeout=600)


def test_find_package_finds_the_installed_library(tmp_path: Path) -> None:
    configured = configure(EXAMPLES, tmp_path)
    assert configured.returncode == 0, configured.stderr
    run("cmake", "--build", tmp_path, **TOOLS)
    programs = {"attention.c": "attention_c", "attention.cpp": "attention", "generate.cpp": "generate"}
    for source, printed in PRINTED.items():
        assert printed in run(tmp_path / programs[source])
    found = re.search(r"^anyattn_DIR:PATH=(.*)$", (tmp_path / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert found and Path(found.group(1)).resolve() == Path(anyattn.get_include()).parent / "lib/cmake/anyattn"


def test_find_package_refuses_another_version(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        "project(other LANGUAGES CXX)\n"
        "find_package(anyattn 7.5 CONFIG REQUIRED)\n"
    )
    configured = configure(tmp_path, tmp_path / "build")
    assert configured.returncode != 0
    assert f"version: {anyattn.__version__}" in configured.stderr


def test_missing_native_library_is_reported(tmp_path: Path) -> None:
    """Both functions say what is missing; so does a wheel without native parts (tests/test_install.py builds one)."""
    package = tmp_path / "anyattn"
    shutil.copytree(Path(anyattn.__file__).parent, package, ignore=shutil.ignore_patterns("lib", "include"))
    code = (
        "import anyattn\n"
        "for function in (anyattn.get_include, anyattn.get_library):\n"
        "    try: function()\n"
        "    except RuntimeError as error: assert 'not installed' in str(error) and 'compiler' in str(error), error\n"
        "    else: raise AssertionError(function)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANYATTN_")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
