"""CPU backend: host memory, every feature, every pass except gradients of a KV cache."""

from __future__ import annotations

import ctypes
import operator
import threading
from array import array as words

from ...config import settings
from ...definition.dtypes import DTYPES
from ...definition.inputs import Extras
from ...definition.passes import APPEND, BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT
from ...definition.problem import Array, Problem
from ..base import Call, without_cache_gradients
from . import layout, library, score_program, signals
from .mask_blocks import MaskBlocks

HAS_LEFT, HAS_RIGHT, TOP_LEFT, ROTARY_INTERLEAVED, BATCH_INVARIANT, HAS_KV_INDICES, FAST = 1, 2, 4, 8, 32, 64, 128
OUT_OF_MEMORY, INTERRUPTED = 7, 8
MESSAGE_BYTES = 512
# Evidence for each processor, shown in the README, the documentation and `anyattn info`.
EVIDENCE = {
    "tested": (
        "x86-64 with AVX-512 and bfloat16 instructions",
        "the same machine restricted to AVX-512, to AVX2 with FMA, and to the instructions of every x86-64",
        "AMX on emulated tiles (conformance tests)",
        "arm64 under qemu (native tests, a sample of the Python tests)",
        "Windows on x86-64 under wine (native tests)",
        "musl on x86-64 (native tests)",
    ),
    "compiled": ("Windows on arm64", "macOS on x86-64 and arm64"),
    "expected": ("other processors",),
}

Values = dict[str, float]


class _Message(threading.local):
    """Buffer for the library's error message, one per thread."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(MESSAGE_BYTES)
        self.address = ctypes.addressof(self.buffer)


_message = _Message()


class CpuBackend:
    """Backend of the CPU engine."""

    name = "cpu"
    passes = frozenset((FORWARD, BACKWARD, TANGENT, SECOND, FORWARD_TANGENT, APPEND))
    score_functions = passes - {APPEND}
    extras = frozenset(Extras._fields) & {*layout.ARRAYS, *layout.TABLES}
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
            verb = "writes to" if problem.pass_ is APPEND else "computes in"
            reasons.append(f"{verb} host memory only, got q on {problem.device}")
        return reasons + without_cache_gradients(problem) + score_program.limits(problem)

    def avoids(self, problem: Problem) -> list[str]:
        return []

    def plan(self, problem: Problem) -> CpuPlan:
        return CpuPlan(library.load(), problem)


class CpuPlan:
    """Plan with a packed struct for its problem. Each call copies the struct and fills in addresses."""

    lse_optional = True

    def __init__(self, native: library.Library, problem: Problem) -> None:
        values = _common(native) | (_append_values(problem) if problem.pass_ is APPEND else _attention_values(problem))
        outputs = problem.outputs()
        inputs = {name: array for name, array in problem.arrays.items() if name in layout.ARRAYS}
        if problem.pass_ is APPEND and not outputs:  # without rotary, q is unchanged
            del inputs["q"]
        for name, array in {**inputs, **outputs}.items():
            values |= _array(name, array, packed_q=problem.packed_q)
        tables = tuple(name for name in layout.TABLES if name in problem.arrays)
        if problem.score:
            # kept, because the struct has its address
            self._program = score_program.lower(problem.functions, second=problem.pass_ is SECOND)
            values |= _program_values(problem, *self._program.buffer_info())
        blocks = MaskBlocks(problem) if problem.functions.mask is not None else None
        values |= {} if blocks is None else blocks.fields()
        which = library.PASSES[problem.pass_.name]
        self._template = _Template(native, which, values, (*inputs, *outputs), tables, blocks)
        self.workspace_bytes = 0 if problem.pass_ is APPEND else self._template.workspace()

    def warmup(self) -> None:
        """Do nothing, because nothing has to be compiled."""

    def run(self, call: Call) -> None:
        self._template.run(call)

    def packed(self) -> tuple[bytes, dict[str, int]]:
        """Return the call's struct without addresses, and the 64-bit word of each array's address in it.

        Another framework's program keeps it and fills in addresses in any thread, so no signal interrupts the call.
        """
        return self._template.packed()


class _Template:
    """Packed call without addresses, as 64-bit words, and the positions of the addresses among the words."""

    def __init__(
        self,
        native: library.Library,
        which: int,
        values: Values,
        arrays: tuple[str, ...],
        tables: tuple[str, ...],
        blocks: MaskBlocks | None = None,
    ) -> None:
        self._native, self._which, self._blocks = native, which, blocks
        self._words = words("Q", layout.pack(values))
        self._slots = [_slot(f"{layout.field_of(name)}.data") for name in arrays] + [_slot(name) for name in tables]
        self._names = (*arrays, *tables)
        self._arrays = operator.attrgetter(*arrays, *tables)
        self._workspace, self._workspace_bytes = _slot("workspace"), _slot("workspace_bytes")
        self._message, message_bytes = _slot("message"), _slot("message_bytes")
        self._words[message_bytes] = MESSAGE_BYTES
        self._needed = 0

    def workspace(self) -> int:
        """Return the bytes of workspace, which depend only on sizes."""
        filled = self._words[:]
        for slot in self._slots:
            filled[slot] = 64  # the library only tests addresses of tables for null, and reads none
        filled[self._message] = _message.address
        self._needed = int(self._native.workspace(filled.buffer_info()[0], self._which))
        if self._needed < 0:
            self._fail(-self._needed)
        return self._needed

    def run(self, call: Call) -> None:
        pointer = call.adapter.pointer
        filled = self._words[:]
        for slot, array in zip(self._slots, self._arrays(call)):  # noqa: B905 (a keyword costs time in every call)
            if array is not None:
                filled[slot] = pointer(array)
        if call.workspace is not None:
            filled[self._workspace], filled[self._workspace_bytes] = pointer(call.workspace), self._needed
        filled[self._message] = _message.address
        if self._blocks is not None:
            kinds = self._blocks.of(call)
            filled[_slot("mask_blocks.data")] = kinds.ctypes.data
        status = self._native.passes[self._which](filled.buffer_info()[0])
        if status:
            self._fail(status)

    def packed(self) -> tuple[bytes, dict[str, int]]:
        words = self._words[:]
        for field in ("poll", "poll_user", "message_bytes"):
            words[_slot(field)] = 0
        return words.tobytes(), dict(zip(self._names, self._slots, strict=True))

    def _fail(self, status: int) -> None:
        if status == INTERRUPTED:
            signals.raise_exception_of_handler()
        text = _message.buffer.value.decode(errors="replace") or self._native.error_string(status)
        raise MemoryError(text) if status == OUT_OF_MEMORY else ValueError(text)


def _slot(field: str) -> int:
    return layout.offset(field) // 8


def _common(native: library.Library) -> Values:
    return {
        "size": layout.SIZE,
        "target": native.target_index(),
        **signals.poll(native.poll_python),
    }


def _attention_values(problem: Problem) -> Values:
    interval = problem.interval
    flags = (HAS_LEFT if interval.left is not None else 0) | (HAS_RIGHT if interval.right is not None else 0)
    flags |= TOP_LEFT if problem.alignment == "top-left" else 0
    flags |= BATCH_INVARIANT if problem.batch_invariant else 0
    flags |= FAST if (problem.precision or settings.current().precision) == "fast" else 0
    pages, indices = problem.block_table, problem.kv_indices
    flags |= 0 if indices is None else HAS_KV_INDICES
    return {
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
        "query_start": problem.query_start,
        "key_start": problem.key_start,
        "dropout_threshold": problem.dropout_threshold,
        "num_indices": 0 if indices is None else indices.shape[-1],
    }


def _program_values(problem: Problem, address: int, words: int) -> Values:
    captured = {"num_captured": problem.captured, "num_captured_indices": problem.captured_indices}
    sizes = {name: 0 if array is None else array.shape[0] for name, array in captured.items()}
    return {"score_program": address, "score_words": words, **sizes}


def _append_values(problem: Problem) -> Values:
    rotation, cache, pages, cos = problem.rotation, problem.k, problem.block_table, problem.rotary_cos
    return {
        "flags": (ROTARY_INTERLEAVED if rotation.interleaved else 0) | (HAS_LEFT if rotation.by_row else 0),
        "batch": problem.batch,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "nheads": problem.nheads,
        "nheads_kv": problem.nheads_kv,
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "batch_k": 0 if problem.paged else cache.shape[0],
        "num_pages": cache.shape[0] if problem.paged else 0,
        "page_size": problem.page_size,
        "max_pages": 0 if pages is None else pages.shape[1],
        "left": problem.seqlen_k,
        "rotary_dim": problem.rotary_dim,
        "rotary_positions": 0 if cos is None else cos.shape[0],
        "seqlen_new": problem.seqlen_new,
    }


def _array(name: str, array: Array, *, packed_q: bool) -> Values:
    """Return the strides for the C struct. bias and mask broadcast by stride 0; statistics are (batch, nheads, row).

    Lists of selected keys are (batch, nheads_kv, row, entry), with stride 0 if KV heads share them. Scales are (entry,
    slot, head, sequence).
    """
    strides: tuple[int, ...] = array.strides
    if name in ("bias", "mask", "dbias", "tbias"):
        strides = tuple(0 if size == 1 else stride for size, stride in zip(array.shape, strides, strict=True))
    elif name in ("lse", "dlse", "tlse", "ddlse", "alibi_slopes"):
        strides = (0,) * (3 - len(strides)) + strides if name != "alibi_slopes" else (0,) * (2 - len(strides)) + strides
    elif name == "kv_indices":
        *entry, row, last = strides if packed_q else strides[1:]
        strides = (0 if packed_q else strides[0], *(entry or (0,)), row, last)
    elif name in ("k_scale", "v_scale"):
        strides = _scale_strides(strides)
    elif len(array.shape) > 1 and not name.startswith("rotary"):
        strides = array.strides4()
    padded = (*strides, *[0] * (4 - len(strides)))
    field = layout.field_of(name)
    values: Values = {f"{field}.stride{axis}": stride for axis, stride in enumerate(padded)}
    return values | {f"{field}.dtype": DTYPES[array.dtype].code}


def _scale_strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of scales for all keys, per head, per sequence and head, or per slot and head."""
    if len(strides) == 3:
        return (*strides, 0)
    *sequence, head = strides or (0,)
    return (0, 0, head, *(sequence or (0,)))
