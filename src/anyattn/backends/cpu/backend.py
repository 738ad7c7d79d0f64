"""CpuBackend: host memory, every feature, forward and backward; sequences of a paged cache have no backward."""

from __future__ import annotations

import ctypes
import operator
import threading
from array import array as words
from typing import TYPE_CHECKING, Any

from ...config import settings
from ...definition.problem import Array, Problem
from ..base import Call, contiguous
from . import layout, library

if TYPE_CHECKING:
    from ...definition.kvcache import Append

DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "float64": 4, "bool": 5, "int32": 6}
HAS_LEFT, HAS_RIGHT, TOP_LEFT, ROTARY_INTERLEAVED, BATCH_INVARIANT = 1, 2, 4, 8, 32
OUT_OF_MEMORY = 7
MESSAGE_BYTES = 512
# How well each processor is known: README, documentation and `anyattn info` show it.
EVIDENCE = {
    "tested": (
        "x86-64 with AVX-512 and bfloat16 instructions",
        "forced there: AVX-512, AVX2 with FMA, any x86-64",
        "emulated: arm64, the native tests",
    ),
    "compiled": ("Windows and macOS on x86-64 and arm64",),
    "expected": ("others",),
}

Values = dict[str, float]


class _Message(threading.local):
    """Where the library says what was wrong, for each thread."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(MESSAGE_BYTES)
        self.address = ctypes.addressof(self.buffer)


_message = _Message()


class CpuBackend:
    """The native engine."""

    name = "cpu"
    may_fail = False

    def available(self, *, named: bool = False) -> str | None:
        try:
            library.load().target_index()
        except library.LibraryError as error:
            return str(error)
        return None

    def supports(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"computes in host memory only; q is on {problem.device}")
        if problem.dout is not None and (problem.paged or problem.cache_batch_idx is not None):
            reasons.append("has no backward through a KV cache (block_table, cache_batch_idx)")
        return reasons

    def avoids(self, problem: Problem) -> list[str]:
        return []

    def plan(self, problem: Problem) -> CpuPlan:
        return CpuPlan(library.load(), problem)

    def supports_append(self, append: Append) -> list[str]:
        return [] if append.q.device == "cpu" else [f"writes to host memory only; q is on {append.q.device}"]

    def append(self, append: Append, call: Call) -> None:
        native = library.load()
        values = _common(native) | _append_values(append)
        names: tuple[str, ...] = ("q", "k", "v", "new_k", "new_v", "rotary_cos", "rotary_sin")
        if call.out is None:  # no rotary: q stays as it is
            values = {name: value for name, value in values.items() if not name.startswith("q.")}
            names = names[1:]
        else:
            values |= _array("out", contiguous(append.q.shape, append.q.dtype))
            names = (*names, "out")
        tables = ("cache_seqlens", "cache_batch_idx", "block_table")
        _Template(native, library.APPEND, values, names, tables).run(call)


class CpuPlan:
    """A packed struct for this problem; each call copies it and fills in addresses."""

    lse_optional = True

    def __init__(self, native: library.Library, problem: Problem) -> None:
        backward = problem.dout is not None
        values = _common(native) | _problem_values(problem)
        outputs = _gradients(problem) if backward else _results(problem)
        for name in outputs:
            values |= _array(name, outputs[name])
        arrays = (
            "q",
            "k",
            "v",
            "bias",
            "mask",
            "alibi_slopes",
            "sink",
            *(("out", "lse", "dout", "dlse") if backward else ()),
        )
        tables = tuple(name for name in layout.TABLES if getattr(problem, name, None) is not None)
        names = tuple(name for name in arrays if getattr(problem, name) is not None)
        which = library.BACKWARD if backward else library.FORWARD
        self._template = _Template(native, which, values, (*names, *outputs), tables)
        needed = self._template.workspace()
        self.forward_bytes = 0 if backward else needed
        self.backward_bytes = needed if backward else 0

    def warmup(self) -> None:
        pass

    def forward(self, call: Call) -> None:
        self._template.run(call)

    def backward(self, call: Call) -> None:
        self._template.run(call)


class _Template:
    """A call without addresses, as 64-bit words, and which words the addresses are."""

    def __init__(
        self, native: library.Library, which: int, values: Values, arrays: tuple[str, ...], tables: tuple[str, ...]
    ) -> None:
        self._native, self._which = native, which
        self._words = words("Q", layout.pack(values))
        self._slots = [_slot(f"{name}.data") for name in arrays] + [_slot(name) for name in tables]
        self._arrays = operator.attrgetter(*arrays, *tables)
        self._workspace, self._workspace_bytes = _slot("workspace"), _slot("workspace_bytes")
        self._message, message_bytes = _slot("message"), _slot("message_bytes")
        self._words[message_bytes] = MESSAGE_BYTES
        self._needed = 0

    def workspace(self) -> int:
        """Bytes of workspace, from sizes alone."""
        filled = self._words[:]
        for slot in self._slots:
            filled[slot] = 64  # tables are told from their addresses: any will do, none is read
        filled[self._message] = _message.address
        self._needed = int(self._native.workspace(filled.buffer_info()[0], self._which))
        if self._needed < 0:
            self._fail(-self._needed)
        return self._needed

    def run(self, call: Call) -> None:
        pointer = call.adapter.pointer
        filled = self._words[:]
        for slot, array in zip(self._slots, self._arrays(call), strict=True):
            if array is not None:
                filled[slot] = pointer(array)
        if call.workspace is not None:
            filled[self._workspace], filled[self._workspace_bytes] = pointer(call.workspace), self._needed
        filled[self._message] = _message.address
        status = self._native.passes[self._which](filled.buffer_info()[0])
        if status:
            self._fail(status)

    def _fail(self, status: int) -> None:
        text = _message.buffer.value.decode(errors="replace") or self._native.error_string(status)
        raise MemoryError(text) if status == OUT_OF_MEMORY else ValueError(text)


def _slot(field: str) -> int:
    return layout.offset(field) // 8


def _common(native: library.Library) -> Values:
    return {
        "size": layout.SIZE,
        "num_threads": settings.current().num_threads,
        "target": native.target_index(),
    }


def _problem_values(problem: Problem) -> Values:
    interval = problem.interval
    flags = (HAS_LEFT if interval.left is not None else 0) | (HAS_RIGHT if interval.right is not None else 0)
    flags |= TOP_LEFT if problem.alignment == "top-left" else 0
    flags |= BATCH_INVARIANT if problem.batch_invariant else 0
    pages = problem.block_table
    values: Values = {
        "flags": flags,
        "batch": problem.batch,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "nheads": problem.nheads,
        "nheads_kv": problem.nheads_kv,
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "total_q": problem.q.shape[0] if problem.packed_q else 0,
        "total_k": problem.k.shape[0] if problem.packed_k else 0,
        "batch_k": 0 if problem.packed_k or problem.paged else problem.k.shape[0],
        "num_pages": problem.k.shape[0] if problem.paged else 0,
        "page_size": problem.page_size,
        "max_pages": pages.shape[1] if pages is not None else 0,
        "scale": problem.scale,
        "softcap": problem.softcap,
        "left": interval.left or 0,
        "right": interval.right or 0,
        "chunk": interval.chunk,
        "dropout_threshold": problem.dropout_threshold,
    }
    for name in ("q", "k", "v", "bias", "mask", "alibi_slopes", "sink", "out", "lse", "dout", "dlse"):
        array: Array | None = getattr(problem, name)
        if array is not None:
            values |= _array(name, array)
    return values


def _append_values(append: Append) -> Values:
    paged, cache = append.block_table is not None, append.k
    values: Values = {
        "flags": (ROTARY_INTERLEAVED if append.interleaved else 0) | (HAS_LEFT if append.by_row else 0),
        "batch": append.batch,
        "seqlen_q": append.q.shape[1],
        "seqlen_k": append.slots,
        "nheads": append.q.shape[2],
        "nheads_kv": cache.shape[2],
        "head_dim": append.q.shape[3],
        "head_dim_v": append.v.shape[3],
        "batch_k": 0 if paged else cache.shape[0],
        "num_pages": cache.shape[0] if paged else 0,
        "page_size": append.page_size,
        "max_pages": append.block_table.shape[1] if append.block_table is not None else 0,
        "left": append.slots,
        "rotary_dim": append.rotary_dim,
        "rotary_positions": append.rotary_cos.shape[0] if append.rotary_cos is not None else 0,
        "seqlen_new": append.seqlen_new,
    }
    for name in ("q", "k", "v", "new_k", "new_v", "rotary_cos", "rotary_sin"):
        array: Array | None = getattr(append, name)
        if array is not None:
            values |= _array(name, array)
    return values


def _array(name: str, array: Array) -> Values:
    """Strides as the C struct wants them: bias and mask broadcast by stride 0, statistics as (batch, nheads, row)."""
    strides: tuple[int, ...] = array.strides
    if name in ("bias", "mask", "dbias"):
        strides = tuple(0 if size == 1 else stride for size, stride in zip(array.shape, strides, strict=True))
    elif name in ("lse", "dlse", "alibi_slopes"):
        strides = (0,) * (3 - len(strides)) + strides if name != "alibi_slopes" else (0,) * (2 - len(strides)) + strides
    elif len(array.shape) > 1 and not name.startswith("rotary"):
        strides = array.strides4()
    padded = (*strides, *[0] * (4 - len(strides)))
    values: Values = {f"{name}.stride{axis}": stride for axis, stride in enumerate(padded)}
    return values | {f"{name}.dtype": DTYPES[array.dtype]}


def _results(problem: Problem) -> dict[str, Array]:
    return {
        "out": contiguous(problem.out_shape, problem.dtype),
        "lse": contiguous(problem.lse_shape, problem.compute_dtype),
    }


def _gradients(problem: Problem) -> dict[str, Array]:
    inputs: dict[str, Any] = {
        "dq": problem.q,
        "dk": problem.k,
        "dv": problem.v,
        "dbias": problem.bias,
        "dsink": problem.sink,
    }
    return {name: contiguous(x.shape, x.dtype) for name, x in inputs.items() if x is not None}
