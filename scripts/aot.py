"""Compiles the Triton kernels for GPUs that are not here, and reads from the machine code what they would cost there.

    python scripts/aot.py                        a subset, compared with the committed table
    python scripts/aot.py --all                  every variant for every architecture
    python scripts/aot.py --all --write          ... and the table written anew

Per kernel: registers, bytes of spills, shared memory, matrix instructions. A spill that grew or matrix instructions that
went away fail. Numbers hold for one version of Triton's compiler; with another nothing is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported

import triton
from triton.backends.compiler import GPUTarget

from anyattn.backends.triton.plan import forward_kernels
from anyattn.backends.triton.plan_backward import backward_kernels
from anyattn.problem import Array, Options, Problem, make_problem

TABLE = Path(__file__).resolve().parent.parent / "tests" / "aot.json"
NVIDIA = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201")
UNKNOWN = {"gfx1030": "Triton 3.7 and later refuse it"}  # to this compiler

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"right": 0},
    "window": {"left": 100, "right": 0},
    "chunk": {"chunk": 64},
    "softcap": {"right": 0, "softcap": 30.0},
    "alibi": {"right": 0, "alibi": True},
    "sink": {"right": 0, "sink": True},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "dropout": {"right": 0, "dropout_p": 0.1},
    "varlen": {"right": 0, "varlen": True},
    "paged": {"right": 0, "paged": True},
    "decode": {"right": 0, "seqlen_q": 1, "paged": True},
    "everything": {"left": 100, "right": 0, "softcap": 30.0, "bias": True, "mask": True, "sink": True, "dropout_p": 0.1},
}
SHAPES = (
    *(("bfloat16", size) for size in (32, 64, 80, 96, 128, 192, 256, 512)),
    *(("float16", size) for size in (64, 128)),
    *(("float32", size) for size in (64, 128)),
)
SUBSET_FEATURES = ("causal", "decode", "everything")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()
    names = [name for name in variants(every=arguments.all) if arguments.only in name]
    with Pool(arguments.jobs) as pool:
        found = dict(pool.imap_unordered(measure, names))
    for name in names:
        for kernel, numbers in found[name].items():
            print(f"{name:44} {kernel:24} " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
    if arguments.write:
        entries = {name: found[name] for name in sorted(found)}
        TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": entries}, indent=1) + "\n")
    return report(found)


def variants(*, every: bool) -> list[str]:
    """Names: architecture/dtype/head_dim/feature/direction."""
    found = []
    for arch in (*NVIDIA, *AMD):
        if arch in UNKNOWN:
            continue
        for dtype, size in SHAPES:
            for feature in FEATURES:
                for direction in ("forward", "backward"):
                    paged = FEATURES[feature].get("paged")
                    plain = feature in ("full", "causal", "decode") or (dtype, size) in (("bfloat16", 64), ("bfloat16", 128))
                    if plain and not (paged and direction == "backward"):
                        found.append(f"{arch}/{dtype}/{size}/{feature}/{direction}")
    return found if every else [name for name in found if _in_subset(name)]


def _in_subset(name: str) -> bool:
    arch, dtype, size, feature, _ = name.split("/")
    if arch in ("sm_90", "gfx942"):
        return (dtype, size) == ("bfloat16", "128") and feature in SUBSET_FEATURES or (size, feature) == ("64", "causal")
    return (dtype, size, feature) == ("bfloat16", "128", "causal")


def measure(name: str) -> tuple[str, dict[str, dict[str, int]]]:
    """(name, kernel -> numbers)."""
    arch, dtype, size, feature, direction = name.split("/")
    problem = describe(arch, dtype, int(size), backward=direction == "backward", **FEATURES[feature])
    kernels, _ = backward_kernels(problem) if direction == "backward" else forward_kernels(problem)
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else _amd(arch)
    numbers = {}
    for kernel in kernels:
        built = triton.compile(kernel.template.source(kernel.function, True), target=target, options=kernel.options)
        numbers[kernel.function.__name__] = resources(built)
    return name, numbers


def _amd(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def describe(
    arch: str, dtype: str, size: int, *, backward: bool, seqlen_q: int = 1024, varlen: bool = False, paged: bool = False,
    bias: bool = False, mask: bool = False, alibi: bool = False, sink: bool = False, **options: Any,
) -> Problem:  # fmt: skip
    """A problem on a card of that architecture: 8 query heads, 2 KV heads."""
    rows_q = (2 * seqlen_q,) if varlen else (2, seqlen_q)
    rows_k = (200, 16) if paged else (2048,) if varlen else (2, 1024)
    out = (*rows_q, 8, size)
    lse = (8, 2 * seqlen_q) if varlen else (2, 8, seqlen_q)
    given: dict[str, Any] = {
        "q": (out, dtype),
        "k": ((*rows_k, 2, size), dtype),
        "v": ((*rows_k, 2, size), dtype),
        "bias": bias and ((1, 8, seqlen_q, 1024), dtype),
        "mask": mask and ((2, 1, seqlen_q, 1024), "bool"),
        "alibi_slopes": alibi and ((8,), "float32"),
        "sink": sink and ((8,), "float32"),
        "cu_seqlens_q": varlen and ((3,), "int32"),
        "cu_seqlens_k": varlen and ((3,), "int32"),
        "block_table": paged and ((2, 64), "int32"),
        "seqused_k": paged and ((2,), "int32"),
        "rng_state": options.get("dropout_p") and ((2,), "int64"),
        "out": backward and (out, dtype),
        "dout": backward and (out, dtype),
        "lse": backward and (lse, "float32"),
    }
    arrays = {name: _array(*what, arch) for name, what in given.items() if what}
    return make_problem(arrays, Options(**options))


def _array(shape: tuple[int, ...], dtype: str, device: str) -> Array:
    steps = [1]
    for size in reversed(shape[1:]):
        steps.insert(0, steps[0] * size)
    return Array(shape, tuple(steps), dtype, device)


def resources(built: Any) -> dict[str, int]:
    """What the machine code says."""
    if "cubin" in built.asm:
        usage = _usage(built.asm["cubin"])
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", built.asm["ptx"]))
        return {"registers": registers, "spills": stack + local, "shared": built.metadata.shared, "matrix": matrix}
    code = built.asm["amdgcn"]
    counts = {key: re.search(rf"\.{key}:\s*(\d+)", code) for key in ("vgpr_count", "agpr_count", "vgpr_spill_count")}
    vgpr, agpr, spills = (int(found[1]) if found else 0 for found in counts.values())
    matrix = len(re.findall(r"\b(?:v_mfma|v_wmma)", code))
    return {"registers": vgpr + agpr, "spills": 4 * spills, "shared": built.metadata.shared, "matrix": matrix}


def _usage(cubin: bytes) -> str:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def report(found: dict[str, dict[str, dict[str, int]]]) -> int:
    """Status 1 where something is worse than the committed table says."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": "", "kernels": {}}
    if table["triton"] != triton.__version__:
        print(f"not compared: the table is of Triton {table['triton'] or '(none)'}, this is {triton.__version__}")
        return 0
    worse = list(_worse(found, table["kernels"]))
    print("\n".join([*worse, f"{len(found)} variants compiled, {len(worse)} worse than the table"]))
    return 1 if worse else 0


def _worse(found: dict[str, Any], table: dict[str, Any]) -> Iterator[str]:
    for name, kernels in found.items():
        for kernel, now in kernels.items():
            before = table.get(name, {}).get(kernel)
            if before is None:
                yield f"{name} {kernel}: not in the table (--all --write)"
            elif now["spills"] > before["spills"]:
                yield f"{name} {kernel}: {now['spills']} bytes of spills, {before['spills']} before"
            elif before["matrix"] and not now["matrix"]:
                yield f"{name} {kernel}: lost its matrix instructions"


if __name__ == "__main__":
    sys.exit(main())
