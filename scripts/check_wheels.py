"""Requirements of a wheel on any platform: its contents, its size, and exports and imports of its native library."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import lief

MEGABYTES = 2
LIBRARIES = {
    "manylinux": "libanyattn.so",
    "musllinux": "libanyattn.so",
    "macosx": "libanyattn.dylib",
    "win": "anyattn.dll",
}
INSTALLED = (
    "include/anyattn.h",
    "include/anyattn.hpp",
    "include/anyattn_xla.h",
    "lib/cmake/anyattn/anyattnConfig.cmake",
    "lib/cmake/anyattn/anyattnConfigVersion.cmake",
)
# Libraries that every such system has. An OpenMP runtime or a C++ library in the wheel would be a second one in the
# process.
SYSTEM = {
    "manylinux": r"(libc|libm|libdl|libpthread|librt)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+",
    "musllinux": r"libc\.so",  # the name by which musl's loader knows itself
    "macosx": r"/usr/lib/libSystem\.B\.dylib",
    "win": r"(?i)(kernel32|ntdll|api-ms-win-crt-[\w-]+)\.dll",
}
# Functions that musl 1.2.0 lacks: functions of later versions, and functions of glibc.
NOT_IN_MUSL = (
    r"_Fork|preadv2|pwritev2|qsort_r|reallocarray|statx|tcgetwinsize|tcsetwinsize|renameat2|strptime_l"
    r"|__\w+_chk|__isoc(99|23)_\w+|__cxa_thread_atexit_impl|secure_getenv|qsort_s|gnu_\w+|\w+64"
)
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}
# Symbols that zig's linker cannot hide on macOS: two of its own, and the operators that any C++ library may replace.
UNHIDDEN = r"_mh_dylib_header|__dso_handle|_Z(n[aw]m|d[al]Pv)\w*"

lief.logging.disable()  # `parse` tries every format, and the wrong ones would log errors


class Library(NamedTuple):
    """Shared library of any format. floor: oldest version of the system on which it loads, if the format states it."""

    machine: str
    exports: set[str]
    needs: list[str]
    floor: tuple[int, ...] = ()
    complaints: tuple[str, ...] = ()
    imports: frozenset[str] = frozenset()


def check(wheel: Path, source: Path) -> Iterator[str]:
    """Yield the faults of a wheel that was built from these sources."""
    tag = wheel.stem.split("-")[-1]
    system = re.match("[a-z]+", tag).group()
    if wheel.stat().st_size > MEGABYTES * 1e6:
        yield f"{wheel.stat().st_size / 1e6:.1f} MB; at most {MEGABYTES}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        yield from _check_contents(names, LIBRARIES[system], source)
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
        if f"Tag: py3-none-{tag}\n" not in metadata or "Root-Is-Purelib: false" not in metadata:
            yield f"its metadata says {metadata!r}"
        library = f"anyattn/lib/{LIBRARIES[system]}"
        if library in names:
            data = archive.read(library)
            yield from _check_library(parse(data), tag, functions(source))
            emulated = instruction_sets(source, "emulated")[:-1]
            yield from (f"its library emulates {name}" for name in emulated if name.encode() in data)


def _check_contents(names: list[str], library: str, source: Path) -> Iterator[str]:
    wanted = {f"anyattn/{name}" for name in (f"lib/{library}", *INSTALLED)}
    for folder, inside in ((source / "src" / "anyattn", "anyattn"), (source / "examples", "anyattn/examples")):
        files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".ipynb")
        wanted |= {f"{inside}/{path.as_posix()}" for path in files if "__pycache__" not in path.parts}
    yield from (f"{name} is missing" for name in sorted(wanted - set(names)))
    binaries = [name for name in names if re.search(r"\.(so|dylib|dll|pyd)(\.\d+)*$", PurePosixPath(name).name)]
    yield from (f"{name} has no place in it" for name in binaries if name != f"anyattn/lib/{library}")


def functions(source: Path) -> set[str]:
    """Return the functions that the C headers declare."""
    headers = "\n".join(path.read_text() for path in (source / "native" / "include").glob("*.h"))
    return set(re.findall(r"^ANYATTN_API [^;(]*?\b(anyattn_\w+)\(", headers, re.MULTILINE))


def machine_of(tag: str) -> str:
    """Return the architecture of a platform tag: x86_64 or arm64."""
    return MACHINES[next(name for name in MACHINES if tag.endswith(name))]


def instruction_sets(source: Path, machine: str) -> list[str]:
    """Return the instruction sets that targets.def lists for an architecture, best first."""
    text = (source / "native" / "src" / "targets.def").read_text()
    rows = re.findall(r"^ANYATTN_TARGET\((\w+), (\w+),", text, re.MULTILINE)
    return [name for name, architecture in rows if architecture in ("any", machine)]


def _check_library(library: Library, tag: str, declared: set[str]) -> Iterator[str]:
    system, *version = re.match(r"([a-z]+)(?:_(\d+)_(\d+))?", tag).groups()
    machine = machine_of(tag)
    if library.machine != machine:
        yield f"its library is for {library.machine}"
    if library.exports != declared:
        yield f"exported, but not declared: {sorted(library.exports - declared)}; or the reverse: " + str(
            sorted(declared - library.exports)
        )
    yield from (f"needs {name}" for name in library.needs if not re.fullmatch(SYSTEM[system], name))
    if system == "musllinux":
        yield from _check_musl(library)
    elif system != "win" and not () < library.floor <= tuple(int(part) for part in version):
        yield f"its library needs version {library.floor} of the system"
    yield from library.complaints


def _check_musl(library: Library) -> Iterator[str]:
    """Yield functions that musl 1.2.0 lacks. They are found by name, because musl does not version its functions."""
    if library.floor:
        yield f"its library needs glibc {library.floor}"
    newer = sorted(name for name in library.imports if re.fullmatch(NOT_IN_MUSL, name))
    yield from (f"its library needs {name}, which musl 1.2.0 lacks" for name in newer)


def parse(data: bytes) -> Library:
    """Parse an ELF, Mach-O or PE file."""
    binary = lief.parse(list(data))
    if isinstance(binary, lief.ELF.Binary):
        return _elf(binary)
    if isinstance(binary, lief.MachO.Binary):
        return _macho(binary)
    if isinstance(binary, lief.PE.Binary):
        return _pe(binary)
    raise ValueError("neither ELF nor Mach-O nor PE")


def _elf(binary: lief.ELF.Binary) -> Library:
    machine = {"X86_64": "x86_64", "AARCH64": "arm64"}.get(binary.header.machine_type.name, "another machine")
    names = (need.name for library in binary.symbols_version_requirement for need in library.get_auxiliary_symbols())
    versions = [re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", name) for name in names]
    floor = max(((int(found[1]), int(found[2])) for found in versions if found), default=())
    others = () if all(versions) else ("it needs versions of another library than glibc",)
    exports = {symbol.name for symbol in binary.dynamic_symbols if symbol.exported}
    imports = frozenset(symbol.name for symbol in binary.dynamic_symbols if symbol.imported)
    return Library(machine, exports, list(binary.libraries), floor, others, imports)


def _macho(binary: lief.MachO.Binary) -> Library:
    machine = {"X86_64": "x86_64", "ARM64": "arm64"}.get(binary.header.cpu_type.name, "another machine")
    exports = {symbol.name.removeprefix("_") for symbol in binary.exported_symbols}
    exports = {name for name in exports if not re.fullmatch(UNHIDDEN, name)}
    needs = [library.name for library in binary.libraries if library.command.name != "ID_DYLIB"]
    # Apple's processors load nothing without a signature, but an ad-hoc one is enough.
    unsigned = machine == "arm64" and not binary.has_code_signature
    return Library(machine, exports, needs, tuple(binary.build_version.minos[:2]), ("is not signed",) * unsigned)


def _pe(binary: lief.PE.Binary) -> Library:
    machine = {"AMD64": "x86_64", "ARM64": "arm64"}.get(binary.header.machine.name, "another machine")
    exports = {entry.name for entry in binary.get_export().entries}
    return Library(machine, exports, [library.name for library in binary.imports])


def check_objects(objects: Iterable[Path], tag: str, source: Path) -> Iterator[str]:
    """Yield a message unless each instruction set has an object that exports only its table of kernels.

    The linker keeps one copy of a template or an inline function that two objects export. The baseline could then run
    AVX-512 code.
    """
    targets = [path for path in objects if path.name.startswith("target_")]
    names = sorted(path.name.partition(".")[0].removeprefix("target_") for path in targets)
    wanted = sorted(instruction_sets(source, machine_of(tag)))
    if names != wanted:
        yield f"has the instruction sets {names}, not {wanted}"
    for path in targets:
        shared = list(_shared(path))
        if len(shared) != 1 or "kernels_" not in shared[0]:
            yield f"{path.name} must define its kernel table alone; found {shared}"


def _shared(path: Path) -> Iterator[str]:
    """Yield the symbols, also weak ones, that an object file exports."""
    data = list(path.read_bytes())
    if elf := lief.ELF.parse(data):
        local = lief.ELF.Symbol.BINDING.LOCAL
        yield from (symbol.name for symbol in elf.symbols if symbol.shndx and symbol.binding != local)
    elif macho := lief.MachO.parse(data):
        (binary,) = macho
        yield from (symbol.name for symbol in binary.symbols if symbol.raw_type & 1 and symbol.numberof_sections)
    else:
        coff = lief.COFF.parse(data)
        yield from (symbol.name for symbol in coff.symbols if symbol.is_external and symbol.section_idx)
