"""The checks that `make wheels` applies to every wheel, on the library of this machine and on wrong wheels."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import check_wheels
import pytest

import anyattn
from anyattn.backends.cpu import library
from anyattn.runtime import dispatch
from harness.paths import ROOT


@pytest.fixture(scope="module")
def native() -> Path:
    if "cpu" not in dispatch.available():
        pytest.skip("the native library is not there")
    return Path(library.load().path)


def test_the_library_exports_what_its_header_declares(native: Path) -> None:
    """Not the C++ library's inline functions either, which another library in the process could then use."""
    functions = check_wheels.functions(ROOT)
    assert "anyattn_forward" in functions and len(functions) > 10
    assert check_wheels.parse(native.read_bytes()).exports == functions


def test_library_contains_no_openmp_runtime(native: Path) -> None:
    needs = check_wheels.parse(native.read_bytes()).needs
    assert needs and not [name for name in needs if "omp" in name]


def test_every_available_instruction_set_has_a_row_in_targets_def(native: Path) -> None:
    rows = check_wheels.instruction_sets(ROOT, check_wheels.parse(native.read_bytes()).machine)
    available = library.load().targets()
    assert available == [name for name in rows if name in available]
    assert rows[-1] == available[-1] == "baseline"
    assert "avx2" in check_wheels.instruction_sets(ROOT, "x86_64")
    assert check_wheels.instruction_sets(ROOT, "arm64") == ["baseline"]


def packed(folder: Path, tag: str, files: dict[str, bytes]) -> Path:
    """A wheel of the sources and these files."""
    wheel = folder / f"anyattn-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "anyattn-0.1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{tag}\n\n"
        )
        for name, data in files.items():
            archive.writestr(name, data)
        for source, inside in ((ROOT / "src" / "anyattn", "anyattn"), (ROOT / "examples", "anyattn/examples")):
            for path in source.rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts and path.name != "mask.py":
                    archive.write(path, f"{inside}/{path.relative_to(source).as_posix()}")
    return wheel


def test_every_file_states_the_same_version() -> None:
    numbers = {
        "pyproject.toml": r'^version = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
        "CHANGELOG.md": r"^## (\S+) - ",
        "native/CMakeLists.txt": r"^project\(anyattn VERSION (\S+) ",
        "native/include/anyattn.h": r"^#define ANYATTN_VERSION \w+ /\* (\S+):",
    }
    found = {name: re.search(numbers[name], (ROOT / name).read_text(), re.MULTILINE) for name in numbers}
    assert {name: match and match[1] for name, match in found.items()} == dict.fromkeys(numbers, anyattn.__version__)
    packed = int.from_bytes([int(part) for part in anyattn.__version__.split(".")], "big")
    assert packed == library.VERSION
    assert f"#define ANYATTN_VERSION {packed:#08x} " in (ROOT / "native/include/anyattn.h").read_text()


def test_glibc_library_is_refused_for_musl(tmp_path: Path, native: Path) -> None:
    if sys.platform != "linux" or not check_wheels.parse(native.read_bytes()).floor:
        pytest.skip("the library of this machine is not linked against glibc")
    machine = {"x86_64": "x86_64", "arm64": "aarch64"}[check_wheels.parse(native.read_bytes()).machine]
    wrong = {"anyattn/lib/libanyattn.so": native.read_bytes()}
    text = "\n".join(check_wheels.check(packed(tmp_path, f"musllinux_1_2_{machine}", wrong), ROOT))
    assert "needs libc.so.6" in text and "its library needs glibc" in text


@pytest.mark.parametrize(("imported", "complains"), [("malloc", False), ("statx", True), ("__memcpy_chk", True)])
def test_function_that_musl_lacks_is_detected(imported: str, complains: bool) -> None:
    library = check_wheels.Library("x86_64", set(), ["libc.so"], imports=frozenset({imported}))
    assert bool(list(check_wheels._check_musl(library))) == complains


def test_checks_detect_wrong_wheels(tmp_path: Path, native: Path) -> None:
    installed = {f"anyattn/{name}": b"" for name in check_wheels.INSTALLED}
    wrong = {"anyattn/lib/libanyattn.so": native.read_bytes(), "anyattn/lib/libgomp-24e2ab19.so.1.0.0": b""}
    text = "\n".join(check_wheels.check(packed(tmp_path, "manylinux_2_5_aarch64", installed | wrong), ROOT))
    assert "anyattn/definition/mask.py is missing" in text
    assert "libgomp-24e2ab19.so.1.0.0 has no place in it" in text
    assert "its library is for" in text or check_wheels.parse(native.read_bytes()).machine == "arm64"
    if sys.platform == "linux":
        assert "of the system" in text  # no compiler of today links against a glibc that old
    assert "emulates" not in text
    wrong["anyattn/lib/libanyattn.so"] += b"\0amx_emulated\0"
    text = "\n".join(check_wheels.check(packed(tmp_path, "manylinux_2_5_aarch64", installed | wrong), ROOT))
    assert "its library emulates amx_emulated" in text
    empty = "\n".join(check_wheels.check(packed(tmp_path, "win_amd64", {}), ROOT))
    assert "anyattn/lib/anyattn.dll is missing" in empty and "anyattn/include/anyattn.h is missing" in empty
