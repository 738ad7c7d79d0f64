"""Resource use of code that Triton compiled for a GPU: registers, spills, shared memory, matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

MATRIX_PTX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
MATRIX_AMD = re.compile(r"\b(?:v_mfma|v_wmma)")
SPILL_NVIDIA = re.compile(r"^(?:LDL|STL)\b")
SPILL_AMD = re.compile(r"^(?:scratch|buffer)_(?:load|store)\w* .*(?:Spill|Reload)")
UNREADABLE = 70  # sm_70: no longer supported by Triton's disassembler
SASS = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);")


def resources(built: Any) -> dict[str, int]:
    """Return the resources of a kernel.

    Registers per thread; bytes of spills and, if the code can be read, spill instructions in innermost loops; bytes of
    shared memory; matrix instructions.
    """
    nvidia = "cubin" in built.asm
    registers, spills = _nvidia(built.asm["cubin"]) if nvidia else _amd(built.asm["amdgcn"])
    matrix = MATRIX_PTX.findall(built.asm["ptx"]) if nvidia else MATRIX_AMD.findall(built.asm["amdgcn"])
    numbers = {"registers": registers, "spills": spills, "shared": int(built.metadata.shared), "matrix": len(matrix)}
    if built.metadata.target.arch == UNREADABLE:
        return numbers
    hot = 0
    if spills:
        lines, spill = (sass(built.asm["cubin"]), SPILL_NVIDIA) if nvidia else (_lines(built.asm["amdgcn"]), SPILL_AMD)
        hot = sum(bool(spill.match(line)) for loop in innermost(lines) for line in loop)
    return numbers | {"spills_in_loops": hot}


def _nvidia(cubin: bytes) -> tuple[int, int]:
    usage = cuobjdump(cubin, "--dump-resource-usage")
    registers, stack, local = (int(_found(rf"{key}:(\d+)", usage)) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd(code: str) -> tuple[int, int]:
    registers, spilled = (int(_found(rf"\.{name}:\s*(\d+)", code)) for name in ("vgpr_count", "vgpr_spill_count"))
    return registers, 4 * spilled


def _found(pattern: str, text: str) -> str:
    """Return the group of the first match, or "0"."""
    match = re.search(pattern, text)
    return match[1] if match else "0"


def _lines(code: str) -> list[str]:
    return [line.strip() for line in code.splitlines()]


def sass(cubin: bytes) -> list[str]:
    """Return the instructions, each branch target as a line ".L_0x<address>:" before its instruction."""
    found = SASS.findall(cuobjdump(cubin, "--dump-sass"))
    lines = []
    for address, text in found:
        lines += [f".L_0x{int(address, 16):x}:", re.sub(r"^BRA.*?0x([0-9a-f]+).*", r"branch .L_0x\1", text)]
    return lines


def innermost(lines: list[str]) -> list[list[str]]:
    """Return the bodies of innermost loops, from the target of a backward branch to the branch."""
    labels = {line.partition(":")[0]: at for at, line in enumerate(lines) if re.match(r"\.L\w+:", line)}
    loops = []
    for at, line in enumerate(lines):
        match = re.match(r"(?:s_c?branch\w*|branch)\s+(\.L\w+)", line)
        if match and labels.get(match[1], at) < at:
            loops.append((labels[match[1]], at))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [lines[first : last + 1] for first, last in inner]


def cuobjdump(cubin: bytes, flag: str) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
