"""Fingerprint of the installed Vulkan drivers, without loading them: files, environment, device nodes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

KINDS = ("icd.d", "implicit_layer.d")  # drivers, and layers that the loader inserts by itself
VARIABLES = (
    *("VK_", "XDG_CONFIG_", "XDG_DATA_", "MESA_", "NVIDIA_", "__NV"),
    *("LD_LIBRARY_PATH", "DYLD_", "CUDA_VISIBLE_DEVICES"),
)
NAMED = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES")  # lists of manifests or of their folders
NODES = ("nvidia", "kfd", "dxg")  # in /dev
KERNEL_DRIVER = Path("/sys/module/nvidia/version")
ADAPTERS = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"  # display adapters
ADAPTER_VALUES = ("DriverDesc", "DriverVersion", "VulkanDriverName")


def fingerprint() -> list[object]:
    """Return facts that change with the drivers. Equal lists mean that the same drivers would be loaded."""
    environment = sorted(item for item in os.environ.items() if item[0].startswith(VARIABLES))
    drivers = _registered() if sys.platform == "win32" else [_manifest(path) for path in manifests()]
    return [sys.platform, sys.maxsize, _machine(), _most_memory(), environment, drivers, _nodes()]


def manifests() -> list[Path]:
    """Return the JSON files that the Vulkan loader reads, by the rules of its documentation."""
    found = {path for folder in folders() for path in _entries(folder)}
    for path in _listed():
        found.update([path] if path.suffix == ".json" else _entries(path))
    return sorted(path for path in found if path.suffix == ".json")


def folders() -> list[Path]:
    """Return the folders of manifests."""
    home, prefix = Path("~").expanduser(), Path(sys.prefix)
    bases = [
        *(_paths("XDG_CONFIG_HOME") or [home / ".config"]),
        *(_paths("XDG_CONFIG_DIRS") or [Path("/etc/xdg")]),
        *map(Path, ("/etc", "/usr/local/etc", "/opt/homebrew/etc")),
        *(_paths("XDG_DATA_HOME") or [home / ".local/share"]),
        *(_paths("XDG_DATA_DIRS") or map(Path, ("/usr/local/share", "/usr/share"))),
        *(Path("/opt/homebrew/share"), prefix / "share", prefix / "etc"),
    ]
    return [base / "vulkan" / kind for base in dict.fromkeys(bases) for kind in KINDS]


def _paths(variable: str) -> list[Path]:
    return [Path(part) for part in os.environ.get(variable, "").split(os.pathsep) if part]


def _listed() -> Iterator[Path]:
    for variable in NAMED:
        yield from _paths(variable)


def _manifest(path: Path) -> tuple[object, ...]:
    """Return the state of a manifest and of the library that it names."""
    library = ""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        with path.open("rb") as file:
            described = json.loads(file.read(1 << 16))
        library = str((described.get("ICD") or described.get("layer") or {}).get("library_path", ""))
    return str(path), _state(path), library, _state(path.parent / library) if "/" in library else None


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _machine() -> tuple[str, ...]:
    """Return the machine and its kernel, because a home folder may be shared by several."""
    if sys.platform == "win32":
        import platform

        return platform.node(), platform.version()
    system, version = os.uname(), ""
    with contextlib.suppress(OSError):
        version = KERNEL_DRIVER.read_text(encoding="utf-8")
    return system.nodename, system.release, version


def _most_memory() -> object:
    """Return the limit of a process's address space, because a working driver may fail below it."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)


def _nodes() -> list[str]:
    """Return the device files of GPUs, because containers may get different ones."""
    devices = [path.name for path in _entries(Path("/dev")) if path.name.startswith(NODES)]
    return devices + [path.name for path in _entries(Path("/dev/dri"))]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _registered() -> list[object]:
    """Return the drivers and their versions as Windows lists them."""
    found: list[object] = []
    if sys.platform == "win32":
        import winreg

        with contextlib.suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, ADAPTERS) as adapters:
            for index in range(winreg.QueryInfoKey(adapters)[0]):
                with contextlib.suppress(OSError):
                    adapter = winreg.OpenKey(adapters, winreg.EnumKey(adapters, index))
                    with adapter:
                        found.append([winreg.QueryValueEx(adapter, name)[0] for name in ADAPTER_VALUES])
    return found
