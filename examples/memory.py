"""Peak memory of a piece of work, in addition to the memory that the process already uses (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Return the peak bytes, to about half a megabyte; None if the system does not report them."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # release freed memory first, or its reuse would not be counted
        CLEAR_REFS.write_text("5")  # resets the high-water mark to the resident memory
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
    """Return a size as text, for example 1536000000 -> "1.4 GiB"."""
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
