"""Fails if an object of one instruction set defines more than its table of kernels.

A template or an inline function that two such objects share would be kept once, from either of them: the baseline could
then run AVX-512 code. Arguments: nm, and all object files of the library.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GLOBAL, WEAK = "TDBRGSCA", "VWvwu"


def main(nm: str, *objects: str) -> int:
    targets = [path for path in objects if Path(path).name.startswith("target_")]
    problems = [] if targets else ["no object of a target among the arguments"]
    for path in targets:
        symbols = defined(nm, path)
        weak = [name for kind, name in symbols if kind in WEAK]
        shared = [name for kind, name in symbols if kind in GLOBAL]
        if weak:
            problems.append(f"{Path(path).name} has weak symbols: {', '.join(weak)}")
        if len(shared) != 1 or "kernels_" not in shared[0]:
            problems.append(f"{Path(path).name} must define its kernel table alone; found {', '.join(shared)}")
    sys.stdout.write("\n".join([*problems, f"{len(targets)} targets", ""]))
    return 1 if problems else 0


def defined(nm: str, path: str) -> list[tuple[str, str]]:
    """(kind, name) of every symbol that the object defines, except those of the sanitizers."""
    lines = subprocess.run([nm, "--defined-only", path], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [(words[-2], words[-1]) for words in map(str.split, lines) if len(words) >= 2]
    return [(kind, name) for kind, name in symbols if not name.lstrip("_").startswith(("asan", "odr_asan", "tsan"))]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
