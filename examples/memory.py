"""How much memory a piece of work needs at its peak, beyond what the process holds already (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Bytes, to about half a megabyte; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back first, or it would be used again unseen
        CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now
        before = _resident("VmHWM")
    except (AttributeError, OSError, TypeError):
        work()
        return None
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(found[1]) * 1024


def text(size: float | None) -> str:
    """1536000000 -> "1.4 GiB" """
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
