"""Compile the Triton kernels for GPUs that are not installed, and read their resource use from the machine code.

    python scripts/aot.py                        a subset, compared with the committed table
    python scripts/aot.py --all                  every feature and every head size, for every architecture
    python scripts/aot.py --all --write          the same, and writes the table

Fails if a kernel does not compile, needs more shared memory than the GPU has, spills inside a loop without an entry in
MAY_SPILL, or uses no matrix instructions on 16-bit inputs although the GPU has them. For versions of Triton in the
table, it also fails if a kernel spills more than the table allows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
os.environ["ANYATTN_CACHE"] = os.devnull  # use the tiles of the package, not tuned ones

import torch
import triton
from aot_functions import FUNCTIONS
from machine_code import resources
from triton.backends.compiler import GPUTarget

from anyattn.backends.triton.append import append_kernels
from anyattn.backends.triton.device import largest_head_dim, refusal
from anyattn.backends.triton.launch import Kernel
from anyattn.backends.triton.plan import build
from anyattn.backends.triton.tuning import has_tf32
from anyattn.definition.options import Options, Rotation
from anyattn.definition.passes import APPEND, FORWARD, PASSES, Pass
from anyattn.definition.problem import Array, Problem
from anyattn.definition.score.graph import Graph
from anyattn.definition.validate import make_problem
from anyattn.frameworks.torch.score_functions import traced

TABLE = Path(__file__).resolve().parent.parent / "tests" / "backends" / "triton" / "aot.json"
NVIDIA = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201")
NO_MATRIX = ("sm_70", "sm_75", "gfx1030")  # Triton uses no matrix instructions, or the architecture has none
# Bytes of shared memory that one program may take.
SHARED = {"sm_70": 98304, "sm_75": 65536, "sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx950": 163840}
SHARED |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101376)
SHARED |= dict.fromkeys(("gfx908", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1201"), 65536)

STORED = {"int8": "int8", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}  # quantised keys and values
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
    "tables": {"right": 0, "tables": True},
    "holes": {"left": 100, "right": -10, "scale": -0.1},
    "unaligned": {"right": 0},
    "paged": {"right": 0, "paged": True},
    "decode": {"right": 0, "seqlen_q": 1, "paged": True},
    "few": {"right": 0, "seqlen_q": 16},
    **{name: {"right": 0, "stored": stored} for name, stored in STORED.items()},
    **{
        f"decode_{name}": {"right": 0, "seqlen_q": 1, "paged": True, "stored": stored}
        for name, stored in STORED.items()
    },
    "everything": {
        "left": 100,
        "right": 0,
        "softcap": 30.0,
        "bias": True,
        "mask": True,
        "sink": True,
        "dropout_p": 0.1,
    },
    **{f"score_{name}": {"functions": name} for name in FUNCTIONS},
}
PRECISIONS = {"tf32x3": "high", "tf32": "medium"}  # features of float32 -> torch's names
DERIVATIVES = ("tangent", "second")
DIRECTIONS = ("forward", "backward", *DERIVATIVES, "append")
SHAPES = (
    *(("bfloat16", size) for size in (32, 64, 80, 96, 128, 192, 256, 512)),
    *(("float16", size) for size in (64, 128)),
    *(("float32", size) for size in (64, 128, 256, 512)),
)
# Variants whose loops may spill, with the reason. Names that begin with a version of Triton apply only to it.
MAY_SPILL = {
    "3.6.0/sm_90/": "a few addresses of the edge loops, and of dk and dv; 3.9 has enough registers",
    "sm_7": "no matrix instructions: operands of products are in registers",
    "gfx1": "256 registers, many of which hold a tile of 16 rows by 128 dimensions",
    "/float32/": "products without matrix instructions",
    "/unaligned/": "elements are loaded one by one, and each has an address",
    "/chunk/": "64-bit remainders and an address, in edge loops",
    "sm_120/bfloat16/128/holes/forward": "visible keys, in the edge loop",
    "sm_90/bfloat16/128/softcap/backward": "the derivative of the softcap next to the scores of dk and dv",
    "/bias/": "64-bit addresses of a tile of scores",
    "/mask/": "64-bit addresses of a tile of scores",
    "/dropout/": "the words of Philox next to the scores",
    "/everything/": "all of these together",
    "/score_": "values of the functions next to the scores",
}
WITH_PRODUCTS = tuple(
    f"attention_{part}"
    for part in (
        *("forward", "backward_dkv", "backward_dq", "backward_dbias", "backward_dcaptured"),
        *("tangent", "second_dkv", "second_dq", "second_dbias"),
    )
)
SUBSET_FEATURES = ("causal", "decode", "everything", "score_documents", "score_relative")
WITH_FUNCTIONS = ("sm_80", "sm_90", "gfx942")  # every score function; others have one, with a table

Numbers = dict[str, int]
Kernels = dict[str, Numbers]  # by name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the results to the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--arch", default="", help="only these: sm_90,gfx942")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()
    archs = arguments.arch.split(",") if arguments.arch else [*NVIDIA, *AMD]
    names = [name for name in variants(every=arguments.all) if name.split("/")[0] in archs and arguments.only in name]
    table = json.loads(TABLE.read_text())
    known = table.get(triton.__version__, {})
    found: dict[str, Kernels] = {}
    with Pool(arguments.jobs) as pool:
        for name, kernels in pool.imap_unordered(measure, names):
            found[name] = kernels
            for kernel, numbers in kernels.items():
                print(f"{name:44} {kernel:26}", *(f"{key} {value}" for key, value in numbers.items()), flush=True)
    wrong = list(faults(found))
    if arguments.write:
        kept = {name: known[name] for name in variants(every=True) if name in known}
        write({**table, triton.__version__: kept | found})
    elif known:
        wrong += worse(found, known)
    else:
        print(f"not compared: the table is of Triton {', '.join(table)}, this is {triton.__version__}")
    print("\n".join([*wrong, f"{len(found)} variants compiled, {len(wrong)} complaints"]))
    return 1 if wrong or not found else 0


def write(table: dict[str, dict[str, Kernels]]) -> None:
    """Write version of Triton -> variant -> kernel -> numbers, with one line per kernel."""
    versions = []
    for version, variants in table.items():
        rows = []
        for name in sorted(variants):
            lines = [f"   {json.dumps(kernel)}: {json.dumps(numbers)}" for kernel, numbers in variants[name].items()]
            rows.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n", encoding="utf-8")


def variants(*, every: bool) -> list[str]:
    """Return names architecture/dtype/head_dim/feature/direction.

    Every feature is compiled at one head size, and every head size causal, with many and with few queries.
    """
    found = [
        f"{arch}/{dtype}/{size}/{feature}/{direction}"
        for arch in (*NVIDIA, *AMD)
        if not refusal(arch)
        for dtype, size in SHAPES
        for feature in (*FEATURES, *PRECISIONS)
        for direction in DIRECTIONS
        if _exists(arch, dtype, size, feature, direction)
    ]
    return found if every else [name for name in found if _in_subset(name)]


def _exists(arch: str, dtype: str, size: int, feature: str, direction: str) -> bool:
    if feature in PRECISIONS:
        return (dtype, size) == ("float32", 128) and has_tf32(arch) and direction in ("forward", "backward")
    if feature.startswith("score_"):
        shapes = [(kind, width) for kind in ("bfloat16", "float16") for width in (64, 128)]
        if arch not in WITH_FUNCTIONS:
            shapes = [("bfloat16", 128)] if feature == "score_relative" else []
        return (dtype, size) in shapes and direction in ("forward", "backward")
    paged, usual = FEATURES[feature].get("paged", False), (dtype, size) == ("bfloat16", 128)
    if direction == "append":
        return (feature == "paged" or feature in STORED) and usual
    if direction != "forward" and (paged or feature == "few"):
        return False
    if size > largest_head_dim(arch, dtype, pass_named(direction)):
        return False
    if direction in DERIVATIVES:
        sizes = dtype != "float32" and size in (64, 128)
        return sizes and (feature == "causal" or (feature == "everything" and usual and arch in ("sm_90", "gfx942")))
    return feature in ("causal", "decode", "few") or usual


def pass_named(direction: str) -> Pass:
    return next(one for one in PASSES if one.name == direction)


def _in_subset(name: str) -> bool:
    arch, dtype, size, feature, direction = name.split("/")
    if direction in DERIVATIVES:  # a second derivative includes the kernel of the tangent
        return (dtype, size) == ("bfloat16", "128") and (direction == "second" or arch in ("sm_90", "gfx942"))
    if "stored" in FEATURES.get(feature, {}):
        return arch in ("sm_80", "sm_90", "gfx942") and (direction == "append" or feature.startswith("decode"))
    if arch in ("sm_90", "gfx942"):
        wide = (dtype, size) == ("bfloat16", "128") and feature in SUBSET_FEATURES
        return wide or (size, feature) == ("64", "causal") or direction == "append"
    return (dtype, size, feature) == ("bfloat16", "128", "causal")


def measure(name: str) -> tuple[str, Kernels]:
    """Return (name, kernel -> numbers)."""
    arch, _, _, feature, _ = name.split("/")
    torch.set_float32_matmul_precision(PRECISIONS.get(feature, "highest"))
    numbers: Kernels = {}
    for kernel in kernels_of(name):
        source = kernel.template.source(kernel.function, feature != "unaligned")
        found = resources(triton.compile(source, target=target_of(arch), options=kernel.options))
        most = numbers.setdefault(kernel.function.__name__, found)  # an append runs one function three times
        most.update({key: max(most[key], value) for key, value in found.items()})
    return name, numbers


def kernels_of(name: str) -> list[Kernel]:
    arch, dtype, size, feature, direction = name.split("/")
    if direction == "append":
        return append_kernels(describe_append(arch, dtype, int(size), STORED.get(feature, "")))
    given = FEATURES.get(feature, FEATURES["causal"])
    return build(describe(arch, dtype, int(size), pass_named(direction), **given))[0]


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def describe_append(device: str, dtype: str, size: int, stored: str = "") -> Problem:
    """Return a problem that appends one row to each of two sequences in a paged cache, with rotary."""
    rows, half = (2, 1), size // 4
    given = {
        "q": ((*rows, 8, size), dtype),
        **dict.fromkeys(("k", "v"), ((9, 16, 2, size), stored or dtype)),
        "new_k": ((*rows, 2, size), dtype), "new_v": ((*rows, 2, size), dtype),
        "rotary_cos": ((99, half), dtype), "rotary_sin": ((99, half), dtype),
        "cache_seqlens": ((2,), "int32"), "block_table": ((2, 4), "int32"),
    }  # fmt: skip
    if stored:
        given |= dict.fromkeys(("k_scale", "v_scale"), ((9, 16, 2), "float32"))
    arrays = {name: array(*what, device) for name, what in given.items()}
    return make_problem(arrays, Rotation(interleaved=True, by_row=True), APPEND)


def describe(
    arch: str, dtype: str, size: int, pass_: Pass = FORWARD, *, seqlen_q: int = 1024, varlen: bool = False,
    paged: bool = False, tables: bool = False, bias: bool = False, mask: bool = False, alibi: bool = False,
    sink: bool = False, stored: str = "", functions: str = "", **options: Any,
) -> Problem:  # fmt: skip
    """Return a problem on a card of that architecture: 8 query heads, 2 KV heads."""
    rows_q = (2 * seqlen_q,) if varlen else (2, seqlen_q)
    rows_k = (200, 16) if paged else (2048,) if varlen else (2, 1024)
    out = (*rows_q, 8, size)
    lse = (8, 2 * seqlen_q) if varlen else (2, 8, seqlen_q)
    given: dict[str, Any] = {
        "q": (out, dtype),
        "k": ((*rows_k, 2, size), stored or dtype),
        "v": ((*rows_k, 2, size), stored or dtype),
        **dict.fromkeys(("k_scale", "v_scale"), stored and ((*rows_k, 2), "float32")),
        "bias": bias and ((1, 8, seqlen_q, 1024), dtype),
        "mask": mask and ((2, 1, seqlen_q, 1024), "bool"),
        "alibi_slopes": alibi and ((8,), "float32"),
        "sink": sink and ((8,), "float32"),
        "cu_seqlens_q": varlen and ((3,), "int32"),
        "cu_seqlens_k": varlen and ((3,), "int32"),
        "block_table": paged and ((2, 64), "int32"),
        **dict.fromkeys(("seqused_q", "leftpad_k", "offset"), tables and ((2,), "int32")),
        "seqused_k": (paged or tables) and ((2,), "int32"),
        "rng_state": options.get("dropout_p") and ((2,), "int64"),
        "out": (out, dtype),
        "dout": (out, dtype),
        "lse": (lse, "float32"),
    }
    graph = traced(*FUNCTIONS[functions]).graph if functions else Graph()
    for name, floats, kind in (("captured", True, "float32"), ("captured_indices", False, "int32")):
        given[name] = graph.sizes(floats=floats) and ((graph.sizes(floats=floats),), kind)
    given |= {f"t{name}": given[name] for name in ("q", "k", "v", "bias", "sink")}
    arrays = {name: array(*what, arch) for name, what in given.items() if what and name in pass_.inputs}
    return make_problem(arrays, Options(score=graph.text if functions else "", **options), pass_)


def array(shape: tuple[int, ...], dtype: str, device: str) -> Array:
    steps = [1]
    for size in reversed(shape[1:]):
        steps.insert(0, steps[0] * size)
    return Array(shape, tuple(steps), dtype, device)


def faults(found: dict[str, Kernels]) -> Iterator[str]:
    """Yield faults that no table may contain."""
    for name, kernels in found.items():
        arch, dtype, *_ = name.split("/")
        for kernel, numbers in kernels.items():
            if numbers["shared"] > SHARED[arch]:
                yield f"{name} {kernel}: {numbers['shared']} bytes of shared memory, {SHARED[arch]} are available"
            if kernel in WITH_PRODUCTS and dtype != "float32" and arch not in NO_MATRIX and not numbers["matrix"]:
                yield f"{name} {kernel}: no matrix instructions"
            if numbers.get("spills_in_loops", 0) and not any(
                part in f"{triton.__version__}/{name}" for part in MAY_SPILL
            ):
                yield f"{name} {kernel}: {numbers['spills_in_loops']} instructions for spills inside loops"


def worse(found: dict[str, Kernels], table: dict[str, Kernels]) -> Iterator[str]:
    """Yield numbers that are worse than those in the table."""
    for name, kernels in found.items():
        for kernel, now in kernels.items():
            before = table.get(name, {}).get(kernel)
            if before is None:
                yield f"{name} {kernel}: not in the table (--write)"
                continue
            for key in ("spills", "spills_in_loops"):
                if now.get(key, 0) > before.get(key, 0):
                    yield f"{name} {kernel}: {key} {now[key]}, {before.get(key, 0)} before"
            if before["matrix"] and not now["matrix"]:
                yield f"{name} {kernel}: lost its matrix instructions"


if __name__ == "__main__":
    sys.exit(main())
