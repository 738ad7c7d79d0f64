"""Install software Vulkan drivers for the tests, without changing the system's own.

python scripts/drivers.py [FOLDER]   unpacks them to FOLDER (build/drivers); needs apt-get, dpkg and a Debian mirror

FOLDER/mesa COMMAND...          runs a command with Mesa 26.1 or later: cooperative matrices, newer validation layer
FOLDER/swiftshader COMMAND...   with SwiftShader, a minimal device: subgroups of 4, no 16-bit types

The packages come from Debian suites newer than the tests' own. They need their own C library, and COMMAND runs with it.
Child processes of COMMAND do not, and find no driver. COMMAND may be a tool of the packages (glslangValidator,
spirv-val).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "drivers"
MIRROR = "http://deb.debian.org/debian"
SUITES = ("trixie", "trixie-backports")
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = ("libvulkan1", "mesa-vulkan-drivers", "vulkan-validationlayers", "glslang-tools", "spirv-tools")
SWIFTSHADER = "chromium-common"  # contains it, and does not need the package's dependencies
SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")
SCRIPT = """#!/bin/sh
# made by scripts/drivers.py
export VK_DRIVER_FILES='{driver}' VK_ICD_FILENAMES='{driver}' VK_LAYER_PATH='{layers}'
program=$(PATH="{root}/usr/bin:$PATH"; command -v "$1") || {{ echo "no command $1" >&2; exit 127; }}
shift
exec '{loader}' --library-path '{libraries}' "$program" "$@"
"""


def main() -> int:
    folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else FOLDER
    stamp, version = folder / "version", hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == version:
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    try:
        install(folder)
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"no further Vulkan drivers for the tests: {error}\n")
        return 1
    stamp.write_text(version)
    return 0


def install(folder: Path) -> None:
    root, state = folder / "root", folder / "apt"
    prepare_apt(state)
    apt(state, "update")
    apt(state, "-t", SUITES[-1], "-y", "--download-only", "install", *PACKAGES)
    apt(state, "download", SWIFTSHADER)
    for package in [*state.glob("cache/archives/*.deb"), *state.glob("*.deb")]:
        command("dpkg-deb", "--extract", package, root)
    shutil.rmtree(state)
    libraries = only(root, "usr/lib/*-linux-gnu")
    layers = folder / "layers"
    layers.mkdir()
    description = only(root, "usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json")
    point(description, "layer", libraries / "libVkLayer_khronos_validation.so", layers / description.name)
    point(
        only(root, "usr/share/vulkan/icd.d/lvp_icd*.json"), "ICD", libraries / "libvulkan_lvp.so", folder / "mesa.json"
    )
    drivers = {"mesa": folder / "mesa.json", "swiftshader": only(root, "usr/lib/chromium/vk_swiftshader_icd.json")}
    for name, driver in drivers.items():
        script, loader = folder / name, only(libraries, "ld-linux*.so*")
        script.write_text(
            SCRIPT.format(driver=driver, layers=layers, root=root, loader=loader, libraries=libraries), encoding="utf-8"
        )
        script.chmod(0o755)


def prepare_apt(state: Path) -> None:
    """Create a separate apt state without installed packages, so that apt fetches everything that the packages need."""
    (state / "lists/partial").mkdir(parents=True)
    (state / "cache/archives/partial").mkdir(parents=True)
    (state / "status").touch()
    lines = [f"deb [signed-by={KEYS}] {mirror()} {suite} main\n" for suite in SUITES]
    (state / "sources.list").write_text("".join(lines), encoding="utf-8")


def mirror() -> str:
    """Return the mirror that the system uses, if it is a Debian."""
    for path in map(Path, SOURCES):
        found = re.search(r"^(?:URIs:|deb) +(https?://\S+/debian/?)\s", path.read_text() if path.exists() else "", re.M)
        if found:
            return found[1]
    return MIRROR


def apt(state: Path, *arguments: str) -> None:
    options = {
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
        "Acquire::Retries": "3",
        "APT::Update::Error-Mode": "any",  # a missing package list is an error immediately
    }
    command("apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items()), *arguments, folder=state)


def command(*arguments: str | Path, folder: Path | None = None) -> None:
    result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{arguments[0]} {arguments[-1]}: {result.stderr.strip()[-1000:]}")


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"the packages have no {pattern}")
    return found[0]


def point(description: Path, kind: str, library: Path, to: Path) -> None:
    """Write the description of the driver or layer with the new path of its library."""
    described = json.loads(description.read_text(encoding="utf-8"))
    described[kind]["library_path"] = str(library)
    to.write_text(json.dumps(described, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
