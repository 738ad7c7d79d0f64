"""Compile shaders/*.comp to src/anyattn/backends/vulkan/binaries, with a manifest of the sources of each binary.

python scripts/make_shaders.py            compiles changed shaders (needs glslangValidator; 16 or later for matrices)
python scripts/make_shaders.py --check    fails if a binary is older than the code of its source; needs no compiler
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHADERS = ROOT / "shaders"
BINARIES = ROOT / "src/anyattn/backends/vulkan/binaries"
MANIFEST = BINARIES / "manifest.json"
COMPILER = os.environ.get("GLSLANG", "glslangValidator")
OPTIONS = ("-V", "-g0", "--target-env", "vulkan1.1")
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
        shuffles = "SHUFFLE" in source.read_text(encoding="utf-8")
        kinds = MATRIX if source.stem.endswith("_matrix") else SCALAR | (SHUFFLE if shuffles else {})
        found |= {f"{source.stem}_{name}": (source, definitions) for name, definitions in kinds.items()}
    return found


def everything(source: Path) -> str:
    """Return the code of a shader without comments and blank lines, followed by the files that it includes."""
    text = COMMENT.sub("", source.read_text(encoding="utf-8"))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines) + "".join(everything(SHADERS / name) for name in INCLUDE.findall(text))


def digest(source: Path, definitions: tuple[str, ...]) -> str:
    return hashlib.sha256(" ".join((*OPTIONS, *definitions, everything(source))).encode()).hexdigest()


def stale() -> dict[str, str]:
    """Return binaries that are missing, without source, changed by hand or older than their source: name -> reason."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}
    wanted = variants()
    found = {name: "has no source" for name in manifest if name not in wanted}
    for name, (source, definitions) in wanted.items():
        entry, path = manifest.get(name, {}), BINARIES / f"{name}.spv"
        if not path.exists():
            found[name] = "is missing"
        elif entry.get("source") != digest(source, definitions):
            found[name] = f"is older than {source.name} or what it includes"
        elif entry.get("binary") != hashlib.sha256(path.read_bytes()).hexdigest():
            found[name] = "is not what the manifest says"
    return found


def compile_all() -> None:
    BINARIES.mkdir(exist_ok=True)
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}
    wanted, old = variants(), stale()
    for name in old:
        manifest.pop(name, None)
        (BINARIES / f"{name}.spv").unlink(missing_ok=True)
        if name in wanted:
            source, definitions = wanted[name]
            path = BINARIES / f"{name}.spv"
            define = [f"-D{word}" for word in definitions]
            subprocess.run([COMPILER, *OPTIONS, *define, source, "-o", path], check=True, cwd=SHADERS)
            binary = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest[name] = {"source": digest(source, definitions), "binary": binary}
    MANIFEST.write_text(json.dumps(dict(sorted(manifest.items())), indent=2) + "\n", encoding="utf-8")


def main() -> int:
    if "--check" not in sys.argv[1:]:
        compile_all()
    wrong = [f"{name}.spv {why}: run `make shaders`" for name, why in stale().items()]
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
