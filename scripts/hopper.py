"""Compile the Hopper kernels without a GPU, and check properties of the machine code that determine their speed.

    python scripts/hopper.py [--only bfloat16/128] [--json FILE] [--schedule]

Fails if a variant spills, needs too much shared memory or does not redistribute registers, or if ptxas has ordered the
instructions of the inner loop so that the tensor cores wait for the exponentials:

    QK..., PV...      the products of this tile and of the previous one are issued together
    WAIT1             the scores are ready, the other product continues
    max, EX2...       softmax, all its exponentials
    mbwait            a spin loop, which prevents ptxas from moving the next wait up
    WAIT0             the other product

It also fails without "fence BAR store" at the end, because the copy engine could then store stale results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported

import triton
from aot import SHARED, describe
from machine_code import resources, sass
from triton.backends.compiler import GPUTarget

from anyattn.backends.triton.sm90 import ARCH, plan
from anyattn.backends.triton.sm90.forward import GROUP_REGISTERS, GROUPS, PRODUCER_REGISTERS, ROWS

MASKS: dict[str, dict[str, Any]] = {"full": {}, "causal": {"right": 0}}
NAMES = {
    "MUFU.EX2": "EX2",
    "FMNMX": "max",
    "SYNCS.PHASECHK": "mbwait",
    "SYNCS.ARRIVE": "arrive",
    "BAR.SYNC": "BAR",
    "FENCE.VIEW.ASYNC": "fence",
    "UTMALDG": "load",
    "UTMASTG": "store",
}  # fmt: skip


class Run(NamedTuple):
    """Number of consecutive instructions of one kind; instructions for which `kind` returns None do not count."""

    name: str
    count: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--json", type=Path, help="what was found, by variant")
    parser.add_argument("--schedule", action="store_true", help="print every variant's order of instructions")
    arguments = parser.parse_args()
    found, wrong = {}, []
    for name, built in variants(arguments.only):
        code = sass(built.asm["cubin"])
        order = schedule(code)
        found[name] = resources(built) | {"loop": loop_of(order)}
        wrong += [f"{name}: {fault}" for fault in faults(name, found[name], code, order)]
        print(name, found[name], *([text(order)] if arguments.schedule else []), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "variants": found}, indent=1) + "\n")
    print("\n".join([*wrong, f"Triton {triton.__version__}: {len(found)} variants, {len(wrong)} complaints"]))
    return 1 if wrong or not found else 0


def variants(only: str) -> Iterator[tuple[str, Any]]:
    """Yield (dtype/head_dim/mask, compiled kernel)."""
    for dtype in plan.DTYPES:
        for size in plan.HEAD_DIMS:
            for mask, options in MASKS.items():
                name = f"{dtype}/{size}/{mask}"
                if only not in name:
                    continue
                problem = describe(ARCH, dtype, size, **options)
                kernel = plan.forward_kernel(problem, None)
                source = kernel.template.source(kernel.function, True)
                built = triton.compile(source, target=GPUTarget("cuda", int(ARCH[3:]), 32), options=kernel.options)
                yield name, built


def schedule(code: list[str]) -> list[Run]:
    """Return the instructions of interest, in the order of their addresses."""
    found: list[Run] = []
    for line in code:
        name = kind(line)
        if name and found and found[-1].name == name:
            found[-1] = Run(name, found[-1].count + 1)
        elif name:
            found.append(Run(name, 1))
    return found


def kind(line: str) -> str | None:
    """Return the kind of an instruction.

    QK and PV differ because PV's second factor is stored by rows and transposed.
    """
    if line.startswith("HGMMA"):
        return "PV" if "tnspB" in line else "QK"
    wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line)
    if wait:
        return f"WAIT{wait[1]}"
    return next((name for start, name in NAMES.items() if line.startswith(start)), None)


def text(order: list[Run]) -> str:
    return " ".join(run.name if run.count == 1 else f"{run.name}*{run.count}" for run in order)


def loops(order: list[Run]) -> list[list[Run]]:
    """Return the inner loop of each warpgroup, between two waits for everything. Only inner loops have a WAIT1."""
    found = []
    for at, run in enumerate(order):
        if run.name == "WAIT1":
            first = max((n + 1 for n in range(at) if order[n].name == "WAIT0"), default=0)
            last = next((n for n in range(at, len(order)) if order[n].name == "WAIT0"), len(order) - 1)
            found.append(order[first : last + 1])
    return found


def loop_of(order: list[Run]) -> str:
    """Return the loop of the first warpgroup, from its first product on."""
    for loop in loops(order):
        start = next((n for n, run in enumerate(loop) if run.name == "QK"), 0)
        return text(loop[start:])
    return ""


def faults(name: str, numbers: dict[str, Any], code: list[str], order: list[Run]) -> Iterator[str]:
    """Yield properties that a variant must not have."""
    if numbers["spills"]:
        yield f"spills {numbers['spills']} bytes"
    if numbers["shared"] > SHARED[ARCH]:
        yield f"needs {numbers['shared']} bytes of shared memory, {SHARED[ARCH]} are available"
    shares = {int(line.rsplit("0x", 1)[1], 16) for line in code if line.startswith("USETMAXREG")}
    for registers in (GROUP_REGISTERS.value, PRODUCER_REGISTERS.value):
        if registers not in shares:
            yield f"no partition gets {registers} registers; {sorted(shares)} are asked for"
    found = loops(order)
    if len(found) != GROUPS.value:
        yield f"{len(found)} loops with products in flight, {GROUPS.value} expected"
    size = int(name.split("/")[1])
    if text(order).count("fence BAR store") != GROUPS.value:
        yield "results are stored without a fence"
    for number, loop in enumerate(found):
        for fault in misplaced(loop, size):
            yield f"warpgroup {number}: {fault}"


def misplaced(loop: list[Run], head_dim: int) -> Iterator[str]:
    """Yield instructions of an inner loop that are out of order."""
    names = [run.name for run in loop]
    wait = names.index("WAIT1")
    before, between = loop[:wait], loop[wait + 1 : -1]
    products = [run for run in before if run.name in ("QK", "PV")]
    wanted = [Run("QK", head_dim // 16), Run("PV", plan.TILE_K // 16)]
    if products != wanted:
        yield f"issues {text(products) or 'nothing'} before it waits for scores; {text(wanted)} expected"
    if names[-1] != "WAIT0":
        yield "never waits for the second product"
    exponentials = sum(run.count for run in between if run.name == "EX2")
    threads = 128
    needed = ROWS.value * plan.TILE_K // threads + 2  # a thread holds two rows, each with a factor
    if exponentials < needed:
        yield f"{exponentials} of {needed} exponentials between the two waits"
    tail = [run.name for run in between][-1:]
    if tail != ["mbwait"]:
        yield f"no barrier is awaited between the exponentials and the second wait, but {' '.join(tail) or 'nothing'}"


if __name__ == "__main__":
    sys.exit(main())
