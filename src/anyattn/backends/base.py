"""What a backend is: it says what it supports and makes plans; a plan computes one Problem on the arrays of a Call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from ..definition.problem import INPUTS, Array, Problem

if TYPE_CHECKING:
    from ..definition.kvcache import Append


class Adapter(Protocol):
    """How a framework's arrays are described, allocated and reached. One object per framework."""

    name: str

    def describe(self, array: Any) -> Array:
        """Metadata of an array."""

    def keys(self, arrays: Sequence[Any]) -> Hashable:
        """The same metadata of all arrays (None: absent) as cheaply as the framework gives it: key of cached plans."""

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        """An uninitialised contiguous array on the device of `like`; dtype "uint8" for workspace."""

    def pointer(self, array: Any) -> int:
        """Address of the first element."""

    def numpy(self, array: Any) -> npt.NDArray[Any]:
        """A view in host memory; bfloat16 comes as uint16."""


class Call:
    """One call: the framework's own arrays, None where absent. Only this changes between equal calls."""

    adapter: Adapter
    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    mask: Any = None
    alibi_slopes: Any = None
    sink: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_q: Any = None
    seqused_k: Any = None
    leftpad_k: Any = None
    offset: Any = None
    block_table: Any = None
    cache_batch_idx: Any = None
    rng_state: Any = None
    out: Any = None
    lse: Any = None
    dout: Any = None
    dlse: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None
    dbias: Any = None
    dsink: Any = None
    workspace: Any = None
    new_k: Any = None  # append only, from here on
    new_v: Any = None
    cache_seqlens: Any = None
    rotary_cos: Any = None
    rotary_sin: Any = None

    def __init__(self, adapter: Adapter, q: Any = None, k: Any = None, v: Any = None, *others: Any, **named: Any):
        self.adapter, self.q, self.k, self.v = adapter, q, k, v
        if others or named:
            self.__dict__.update(zip(INPUTS[3:], others, strict=False), **named)


class Plan(Protocol):
    """Everything about a Problem that does not change between calls."""

    forward_bytes: int  # workspace, allocated by the framework together with the outputs
    backward_bytes: int
    lse_optional: bool  # forward: call.lse may be None where nobody asked for it

    def forward(self, call: Call) -> None:
        """Writes call.out and call.lse. No allocation, no synchronisation, no host read of device values."""

    def warmup(self) -> None:
        """Compiles what the first call would compile."""

    def backward(self, call: Call) -> None:
        """Writes call.dq, dk, dv and, where not None, dbias and dsink, from out, lse, dout and dlse (may be None)."""


class Backend(Protocol):
    """One engine."""

    name: str
    may_fail: bool  # its device may be lost or full: plans then raise DeviceError, having written nothing

    def available(self, *, named: bool = False) -> str | None:
        """None, or why this backend cannot run here; `named`: the caller asked for it by name."""

    def supports(self, problem: Problem) -> list[str]:
        """[] or the reasons against. May look at sizes, never at values in device memory."""

    def avoids(self, problem: Problem) -> list[str]:
        """[] or why the automatic choice passes this backend over although it computes the problem."""

    def plan(self, problem: Problem) -> Plan:
        """Cheap; compiled parts are cached by problem.variant."""

    def supports_append(self, append: Append) -> list[str]:
        """[] or the reasons against."""

    def append(self, append: Append, call: Call) -> None:
        """Writes call.new_k (rotated) and call.new_v into the cache call.k, call.v; rotated call.q into call.out."""


def contiguous(shape: Sequence[int], dtype: str, device: str = "cpu") -> Array:
    """Metadata of a new array."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Array(tuple(shape), tuple(reversed(strides)), dtype, device)


def append_on_host(append: Append, call: Call) -> None:
    """`Backend.append` as the definition has it, for a cache in host memory."""
    from ..definition import reference
    from ..definition.dtypes import narrow, raw
    from ..definition.kvcache import ARRAYS

    given = {name: getattr(call, name) for name in ARRAYS}
    arrays = {name: None if array is None else call.adapter.numpy(array) for name, array in given.items()}
    q = reference.append(append, arrays)
    if q is not None:
        out = raw(call.adapter.numpy(call.out), append.q.dtype)
        out[...] = narrow(q, append.q.dtype)
