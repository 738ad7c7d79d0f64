"""Description of the processor, for benchmark results and bug reports."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Return name, family and model of the first processor; implementer and part on Arm, where Linux has no name."""
    if not CPUINFO.exists():
        return platform.processor() or platform.machine() or "unknown"
    first = CPUINFO.read_text(errors="replace").partition("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in pairs}
    if "model name" in values:
        return f"{values['model name']} (family {values.get('cpu family')}, model {values.get('model')})"
    if "CPU part" in values:
        return f"Arm implementer {values.get('CPU implementer')}, part {values['CPU part']}"
    return platform.machine() or "unknown"
