"""Install software Vulkan drivers for the tests, without changing the system's own.

python scripts/drivers.py [FOLDER]   unpacks them to FOLDER (build/drivers); needs apt-get, dpkg and a Debian mirror

FOLDER/mesa COMMAND...          runs a command with Mesa 26.1 or later: cooperative matrices, newer validation layer
FOLDER/swiftshader COMMAND...   runs it with SwiftShader, a minimal device: subgroups of 4, no 16-bit types

The packages come from newer Debian suites and need their C library, with which COMMAND runs. Child processes of COMMAND
run with the system's C library and find no driver. COMMAND may be a tool of the packages, for example glslangValidator
or spirv-val.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

from debian import only, unpack

FOLDER = Path(__file__).resolve().parent.parent / "build" / "drivers"
SUITES = ("trixie", "trixie-backports")
PACKAGES = ("libvulkan1", "mesa-vulkan-drivers", "vulkan-validationlayers", "glslang-tools", "spirv-tools")
SWIFTSHADER = "chromium-common"  # contains SwiftShader, which does not need the package's dependencies
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
    root = folder / "root"
    unpack(root, SUITES, PACKAGES, alone=(SWIFTSHADER,))
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


def point(description: Path, kind: str, library: Path, to: Path) -> None:
    """Write the description of the driver or layer with the new path of its library."""
    described = json.loads(description.read_text(encoding="utf-8"))
    described[kind]["library_path"] = str(library)
    to.write_text(json.dumps(described, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
