"""Protocol of a backend. It reports what it supports and makes plans; a plan computes a Problem on a Call's arrays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from ..definition.inputs import NO_EXTRAS, Extras, Inputs, Tangents
from ..definition.passes import ARRAYS, FORWARD, TANGENT, Pass
from ..definition.problem import Array, Problem


class Adapter(Protocol):
    """Operations on a framework's arrays: description, allocation, addresses. One object per framework."""

    name: str

    def describe(self, array: Any) -> Array:
        """Return the metadata of an array."""

    def keys(self, arrays: Sequence[Any]) -> Hashable:
        """Return the metadata of all arrays (None: absent) as fast as possible; it is the key of cached plans."""

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        """Return an uninitialised contiguous array on the device of `like`; dtype "uint8" for workspace."""

    def pointer(self, array: Any) -> int:
        """Return the address of the first element."""

    def numpy(self, array: Any) -> npt.NDArray[Any]:
        """Return a view in host memory, bfloat16 as uint16."""

    def tables_on_host(self, device: str) -> bool:
        """Return whether the tables of a call on this device can be read without waiting for it."""


_EXTRAS = Extras._fields


class Call:
    """Arrays of one call, in the framework's types, under their names in `passes.py` (None: absent), and workspace.

    Calls of the same plan differ only in their Call.
    """

    adapter: Adapter
    workspace: Any = None

    def __init__(self, adapter: Adapter, inputs: Inputs | None = None, **named: Any) -> None:
        self.adapter = adapter
        if inputs is not None:
            self.q, self.k, self.v, extras = inputs
            if extras is not NO_EXTRAS:
                arrays = self.__dict__
                for name, x in zip(_EXTRAS, extras):  # noqa: B905 (a keyword costs time in every call)
                    if x is not None:
                        arrays[name] = x
        if named:
            self.__dict__.update(named)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


for _name in ARRAYS:
    setattr(Call, _name, None)


class Plan(Protocol):
    """Computation of a Problem, with everything that does not change between calls."""

    workspace_bytes: int  # allocated by the framework together with the outputs
    lse_optional: bool  # a forward call may have no lse, if the caller does not want it

    def warmup(self) -> None:
        """Compile everything that the first call would compile."""

    def run(self, call: Call) -> None:
        """Write the outputs of the problem's pass.

        This does not allocate, synchronise or read device values on the host.

        A call of the backward pass may have no dbias or dsink, if the caller does not want them.
        """


class Backend(Protocol):
    """Implementation of attention on one kind of device."""

    name: str
    passes: frozenset[Pass]
    score_functions: frozenset[Pass]  # passes that compute score_mod and mask_mod; others refuse them
    extras: frozenset[str]  # names of the supported optional arrays; a problem with another array is refused
    may_fail: bool  # the device may be lost or full; plans then raise DeviceError and have written nothing

    def available(self, *, named: bool = False) -> str | None:
        """Return None, or why this backend cannot run on this machine. named: the caller asked for it by name."""

    def supports(self, problem: Problem) -> list[str]:
        """Return why the problem is not supported, or []. Sizes may be read, but never values in device memory."""

    def avoids(self, problem: Problem) -> list[str]:
        """Return why automatic choice should skip this backend although it supports the problem, or [].

        This is called before `available`, which may have to load a driver.
        """

    def plan(self, problem: Problem) -> Plan:
        """Return a plan. This is fast, because compiled parts are cached by problem.variant."""


def forward_and_tangent(problem: Problem) -> tuple[Problem, Problem]:
    """Return the two passes of a FORWARD_TANGENT problem, for backends that compute one after the other."""
    outputs = problem.outputs()
    saved = {name: outputs[name] for name in FORWARD.outputs}
    given = {name: array for name, array in problem.arrays.items() if name not in Tangents._fields}
    return problem._replace(pass_=FORWARD, arrays=given), problem._replace(pass_=TANGENT).with_arrays(**saved)


def without_starts(problem: Problem) -> list[str]:
    """Return why a part of a longer sequence with dropout is not supported, or [], for backends that count from 0."""
    if problem.dropout_threshold and (problem.query_start or problem.key_start):
        return ["counts dropout's indices from 0 (query_start, key_start)"]
    return []


def without_cache_gradients(problem: Problem) -> list[str]:
    """Return why the backward pass of a quantised or paged KV cache is not supported, or []."""
    if problem.dout is not None and problem.quantised:
        return ["has no backward pass for quantised keys and values"]
    return without_paged_gradients(problem)


def without_paged_gradients(problem: Problem) -> list[str]:
    """Return why the backward pass of a paged KV cache is not supported, or []. Only the NumPy backend supports it."""
    if problem.dout is not None and (problem.paged or problem.cache_batch_idx is not None):
        return ["has no backward through a KV cache (block_table, cache_batch_idx)"]
    return []
