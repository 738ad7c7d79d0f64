"""Compile shaders/*.comp to shaders.tar.xz of the Vulkan backend, with a manifest of the sources of each binary.

One archive takes a third of the space, because the binaries have much in common.

python scripts/make_shaders.py            compiles changed shaders (needs glslangValidator; 16 or later for matrices)
python scripts/make_shaders.py --check    fails if a binary is older than the code of its source; needs no compiler
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHADERS = ROOT / "shaders"
ARCHIVE = ROOT / "src/anyattn/backends/vulkan/shaders.tar.xz"
MANIFEST = ARCHIVE.with_name("shaders.json")
COMPILER = os.environ.get("GLSLANG", "glslangValidator")
OPTIONS = ("-V", "-g0", "--target-env", "vulkan1.1")
# A library keeps its functions and their names.
LIBRARY, LIBRARY_OPTIONS = "function", ("-V", "--keep-uncalled", "--target-env", "vulkan1.1")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
# Suffixes of a shader's name, and what they define
SCALAR = {"f32": (), "16": ("STORAGE_16",)}
SHUFFLE = {"f32_shuffle": ("SHUFFLE",), "16_shuffle": ("STORAGE_16", "SHUFFLE")}
MATRIX = {"f16": ("STORAGE_16", "SHUFFLE"), "bf16": ("STORAGE_16", "SHUFFLE", "BFLOAT")}


def variants() -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Return binary -> its source and its definitions."""
    found = {}
    for source in sorted(SHADERS.glob("*.comp")):
        if source.stem == LIBRARY:
            found[LIBRARY] = (source, ())
            continue
        shuffles = "SHUFFLE" in source.read_text(encoding="utf-8")
        kinds = MATRIX if source.stem.endswith("_matrix") else SCALAR | (SHUFFLE if shuffles else {})
        found |= {f"{source.stem}_{name}": (source, definitions) for name, definitions in kinds.items()}
    return found


def everything(source: Path) -> str:
    """Return the code of a shader without comments and blank lines, followed by the files that it includes."""
    text = COMMENT.sub("", source.read_text(encoding="utf-8"))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines) + "".join(everything(SHADERS / name) for name in INCLUDE.findall(text))


def options(source: Path) -> tuple[str, ...]:
    return LIBRARY_OPTIONS if source.stem == LIBRARY else OPTIONS


def digest(source: Path, definitions: tuple[str, ...]) -> str:
    return hashlib.sha256(" ".join((*options(source), *definitions, everything(source))).encode()).hexdigest()


def stale() -> dict[str, str]:
    """Return binaries that are missing, without source, changed by hand or older than their source: name -> reason."""
    manifest, binaries, wanted = read_manifest(), read_archive(), variants()
    found = {name: "has no source" for name in manifest.keys() | binaries.keys() if name not in wanted}
    for name, (source, definitions) in wanted.items():
        entry = manifest.get(name, {})
        if name not in binaries:
            found[name] = "is missing"
        elif entry.get("source") != digest(source, definitions):
            found[name] = f"is older than {source.name} or what it includes"
        elif entry.get("binary") != hashlib.sha256(binaries[name]).hexdigest():
            found[name] = "is not what the manifest says"
    return found


def read_manifest() -> dict[str, dict[str, str]]:
    """Return the digests of the source and of the binary, by name."""
    return json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}


def read_archive() -> dict[str, bytes]:
    """Return every binary by name."""
    if not ARCHIVE.exists():
        return {}
    with tarfile.open(ARCHIVE) as archive:
        return {Path(member.name).stem: archive.extractfile(member).read() for member in archive}


def write_archive(binaries: dict[str, bytes]) -> None:
    """Write every binary, in an order and with dates that do not depend on this machine."""
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for name, binary in sorted(binaries.items()):
            member = tarfile.TarInfo(f"{name}.spv")
            member.size = len(binary)
            archive.addfile(member, io.BytesIO(binary))


def compile_all() -> None:
    manifest, binaries, wanted = read_manifest(), read_archive(), variants()
    for name in stale():
        manifest.pop(name, None)
        binaries.pop(name, None)
        if name in wanted:
            source, definitions = wanted[name]
            binaries[name] = compile_one(source, definitions)
            binary = hashlib.sha256(binaries[name]).hexdigest()
            manifest[name] = {"source": digest(source, definitions), "binary": binary}
    write_archive(binaries)
    MANIFEST.write_text(json.dumps(dict(sorted(manifest.items())), indent=2) + "\n", encoding="utf-8")


def compile_one(source: Path, definitions: tuple[str, ...]) -> bytes:
    """Return the SPIR-V of a shader."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shader.spv"
        define = [f"-D{word}" for word in definitions]
        subprocess.run([COMPILER, *options(source), *define, source, "-o", path], check=True, cwd=SHADERS)
        return path.read_bytes()


def main() -> int:
    if "--check" not in sys.argv[1:]:
        compile_all()
    wrong = [f"{name}.spv {why}: run `make shaders`" for name, why in stale().items()]
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
