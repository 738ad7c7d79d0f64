"""Child process of `first_contact`: opens the device that would be chosen, and prints its description."""

from __future__ import annotations

import json
import sys

from .api import VulkanError
from .device import Device, Instance


def main() -> None:
    """Print the fields of a `first_contact.Report` as the last line."""
    _leave_no_core()
    try:
        instance = Instance()
        info = instance.choose()
        Device(instance, info)
        found = {"name": info.name, "kind": info.kind, "cache_key": info.cache_key}
    except VulkanError as error:
        found = {"refusal": str(error)}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def _leave_no_core() -> None:
    """Prevent a crash from writing a core file or opening a dialog."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x1 | 0x2)  # no dialog for a fault or a missing library
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
