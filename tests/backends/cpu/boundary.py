"""Wrong fields in the C struct around valid arrays; test_boundary runs `boundary.py wrong` and `boundary.py garbage`.

Every value is one that the library must refuse, or that asks for no more memory than the arrays have: no library sees
through a caller that lies about its allocations.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator

import numpy as np

import anyattn
from anyattn.backends.cpu import layout, library
from anyattn.frameworks.numpy import NumpyAdapter
from anyattn.testing import Case, make_inputs
from harness.memory import Memory, guarded_empty

OFFSETS = {name: layout.offset(name) for name, _ in layout.FIELDS}
KINDS = dict(layout.FIELDS)
NUMBERS = {"q": ctypes.c_int64, "i": ctypes.c_int32, "I": ctypes.c_uint32, "d": ctypes.c_double, "Q": ctypes.c_uint64}
CASES = [
    Case("dense", seqlen_q=5, seqlen_k=9, head_dim=8, head_dim_v=3, bias="full", mask="b1", dropout_p=0.2, sink=True),
    Case("packed", lengths="varlen_seqused", seqlen_q=7, seqlen_k=9, head_dim=5, head_dim_v=4, alibi="bh", dlse=True),
    Case("paged", lengths="paged", page_size=3, seqlen_q=4, seqlen_k=11, head_dim=8, causal=True, offset="each"),
    Case("half", lengths="both", seqlen_q=6, seqlen_k=7, head_dim=9, dtype="float16", chunk=3, window=(4, 2)),
]
LOWEST, HIGHEST = -(2**63), 2**63 - 1
NONSENSE = {
    **{
        name: (-1, LOWEST, HIGHEST)
        for name in layout.SIZES
        if name not in ("total_q", "total_k", "batch_k", "num_pages")
    },
    **dict.fromkeys(("total_q", "total_k", "batch_k", "num_pages"), (-1, LOWEST)),
    **{name: (float("nan"), float("inf"), float("-inf")) for name in ("scale", "softcap")},
    **dict.fromkeys(("chunk", "query_start", "key_start"), (LOWEST, HIGHEST)),
    "flags": (1 << 20, 1 << 31),
    "size": (0, 4, layout.SIZE - 4, layout.SIZE + 8, 2**32 - 8),
    "num_threads": (-1, -(2**31)),
    "target": (-1, 99, 2**31 - 1),
    "dropout_threshold": (65536, 2**32 - 1),
    **{f"{name}.dtype": (0, 7, 10, -1) for name in ("q", "k", "v", "out", "lse", "bias", "mask", "sink", "dout")},
    **{f"{name}.data": (0,) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")},
    **{f"{name}.reserved": (1, -1) for name in ("q", "v", "lse")},
}
# Asks for at most the allocated memory: smaller sizes, fewer strides, fewer arrays, other scalars.
HARMLESS = {
    **dict.fromkeys(("batch", "seqlen_q", "nheads", "nheads_kv", "head_dim", "head_dim_v"), (0, 1, 2)),
    **{f"{name}.stride{axis}": (0,) for name in ("q", "k", "v", "bias", "mask", "dlse", "dout") for axis in range(3)},
    **{f"{name}.data": (0,) for name in ("bias", "mask", "alibi_slopes", "sink", "dlse", "lse", "dbias", "dsink")},
    **dict.fromkeys(("seqused_q", "seqused_k", "leftpad_k", "offset", "rng_state", "workspace"), (0,)),
    "flags": tuple(range(64)),
    "num_threads": (0, 1, 2, 9),
    "left": (-3, 0, 2, LOWEST, HIGHEST),
    "right": (-3, 0, 2, LOWEST, HIGHEST),
    "chunk": (0, 1, 5),
    "softcap": (0.0, 1e-30, 1e30, -1.0),
    "scale": (0.0, -1.0, 1e30, 1e-40),
    "workspace_bytes": (0, 1, 64),
    "message_bytes": (0, 1, 5),
    "message": (0,),
}
TABLES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "offset", "block_table")
Mutation = dict[str, float]


class Process:
    """Runs calls of the public API; each native call is first made with mutated structs."""

    def __init__(self, mutations: Callable[[int, int], Iterator[tuple[Mutation, bool]]]) -> None:
        self.native = library.load()
        self.passes = self.native.passes
        self.native.passes = tuple(self._wrap(which) for which in range(3))
        self.mutations = mutations
        self.memory = Memory()
        NumpyAdapter.empty = guarded_empty(self.memory)  # type: ignore[method-assign]
        self.calls = self.refused = 0
        self.case_index = 0
        self.written: list[np.ndarray] = []

    def _wrap(self, which: int) -> Callable[[int], int]:
        def call(address: int) -> int:
            packed = ctypes.string_at(address, layout.SIZE)
            for mutation, must_fail in self.mutations(self.case_index, which):
                self._mutated(which, packed, mutation, must_fail)
            return int(self.passes[which](address))

        return call

    def _mutated(self, which: int, packed: bytes, mutation: Mutation, must_fail: bool) -> None:
        buffer = ctypes.create_string_buffer(packed + b"\xff" * 64)  # beyond what the library knows
        tables = []
        for name, value in mutation.items():
            field = NUMBERS[KINDS[name]].from_buffer(buffer, OFFSETS[name])
            if name in TABLES and value:  # a table of this value instead
                if not field.value:
                    continue
                tables.append(np.full(64, value, np.int32))
                field.value = tables[-1].ctypes.data
            elif KINDS[name] == "d":
                field.value = value
            else:
                field.value = int(value)
        message = ctypes.create_string_buffer(200)
        if "message" not in mutation and "size" not in mutation:
            ctypes.c_uint64.from_buffer(buffer, OFFSETS["message"]).value = ctypes.addressof(message)
            ctypes.c_int64.from_buffer(buffer, OFFSETS["message_bytes"]).value = int(mutation.get("message_bytes", 200))
        before = [raw.copy() for raw, *_ in self.memory.blocks] if must_fail else []
        bytes_needed = self.native.workspace(buffer, which)
        status = self.passes[which](buffer)
        self.calls += 1
        self.refused += status != 0
        assert 0 <= status <= 7, (mutation, status)
        assert bytes_needed >= -7, (mutation, bytes_needed)
        if must_fail:
            assert status != 0, f"pass {which} accepted {mutation}"
            after = [raw for raw, *_ in self.memory.blocks]
            assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True)), f"{mutation} wrote"
            assert message.value or {"message", "size"} & mutation.keys(), f"{mutation}: no message"

    def run(self) -> None:
        for self.case_index, case in enumerate(CASES):
            inputs = make_inputs(case)
            before = inputs.bytes()
            out, lse = anyattn.attention_forward(**inputs.arguments, backend="cpu")
            if "block_table" not in inputs.arguments:
                anyattn.attention_backward(
                    inputs.dout, out=out, lse=lse, dlse=inputs.dlse, **inputs.arguments, backend="cpu"
                )
            assert inputs.bytes() == before
            self.memory.check()


def present(case: Case, which: int, field: str) -> bool:
    """Return whether this call reads the field."""
    array = field.split(".", maxsplit=1)[0]
    if array in ("out", "lse", "dout", "dq", "dk", "dv") and field.endswith((".data", ".dtype")):
        return array in (("out", "lse", "dout", "dq", "dk", "dv") if which else ("out", "lse"))
    if array in ("bias", "mask", "sink"):
        return bool(getattr(case, array)) or not field.endswith(".dtype")
    if field in ("page_size", "max_pages"):
        return case.lengths.startswith("paged") or field == "page_size"
    return True


def wrong(index: int, which: int) -> Iterator[tuple[Mutation, bool]]:
    """Each nonsense value alone: refused, with a message, and nothing written."""
    for field, values in NONSENSE.items():
        if present(CASES[index], which, field):
            for value in values:
                yield {field: value}, True
    for name in TABLES[:5] + TABLES[6:]:
        if name in make_inputs(CASES[index]).arguments:
            for value in (-1, 10**6, 2**31 - 1, -(2**31)):
                yield {name: value}, True


def garbage(index: int, which: int) -> Iterator[tuple[Mutation, bool]]:
    """Several fields at once, nonsense or harmless: any status, and no crash."""
    rng = np.random.default_rng([index, which])
    everything = {**NONSENSE, **{name: (*values, *NONSENSE.get(name, ())) for name, values in HARMLESS.items()}}
    names = [name for name in everything if name != "size"]
    for _ in range(1500):
        chosen = rng.choice(names, int(rng.integers(1, 5)), replace=False)
        mutation = {str(name): everything[name][int(rng.integers(len(everything[name])))] for name in chosen}
        if rng.random() < 0.3:
            mutation[str(rng.choice(TABLES))] = int(rng.choice([-1, 1, 3, 10**6, -(2**31), 2**31 - 1]))
        yield mutation, False


if __name__ == "__main__":
    process = Process({"wrong": wrong, "garbage": garbage}[sys.argv[1]])
    process.run()
    sys.stdout.write(f"{process.calls} {process.refused}\n")
