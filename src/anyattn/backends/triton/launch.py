"""From a kernel and its arguments to a running program: the same way for every kernel, through the compiler directly.

Arguments are described once per plan, as a Template of typed numbers and named addresses. It gives the signature of the
compiled kernel, so that nothing about sizes is ever specialized, and per call only the addresses are filled in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import triton
from triton.compiler import ASTSource

from ...errors import CompilationError
from ..base import Call
from .device import interpreted

LARGEST_STRIDE = 2**23  # times the rows of a tile, at most 128, and plus the dimensions: below 2^31
ALIGNMENT = 16  # bytes of addresses and elements of strides: what vector loads need
TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "bool": "u8",
}  # fmt: skip


class Number(NamedTuple):
    """A runtime scalar; `stride`: a multiple of ALIGNMENT wherever the arrays are aligned."""

    kind: str
    value: float
    stride: bool = False


class Address(NamedTuple):
    """Where an array of the call begins, plus a number of bytes."""

    name: str
    dtype: str
    offset: int = 0


Leaf = Number | Address | None


def i32(value: int) -> Number:
    return Number("i32", value)


def i64(value: int) -> Number:
    return Number("i64", value)


def f32(value: float) -> Number:
    return Number("fp32", float(np.float32(value)))


def stride(value: int) -> Number:
    """32 bits wherever offsets inside a tile fit into them."""
    return Number("i32" if abs(value) < LARGEST_STRIDE else "i64", value, True)


class Template:
    """The arguments of one kernel: leaves and named tuples of leaves, then constants."""

    def __init__(self, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        self.arguments = tuple(arguments)
        self.constants = constants
        self._parts = [_Part(argument) for argument in arguments]
        strides = [
            leaf.value for part in self._parts for leaf in part.leaves if isinstance(leaf, Number) and leaf.stride
        ]
        self.aligned_strides = all(value % ALIGNMENT == 0 for value in strides)
        self.addresses = [leaf for part in self._parts for leaf in part.leaves if isinstance(leaf, Address)]
        self.names = {leaf.name for leaf in self.addresses}
        self.key = (tuple(part.signature() for part in self._parts), tuple(constants.items()))

    def values(self, pointers: dict[Address, Any]) -> list[Any]:
        """What the launcher takes."""
        return [part.fill(pointers) for part in self._parts] + list(self.constants.values())

    def source(self, function: Any, aligned: bool) -> ASTSource:
        """What the compiler takes."""
        names = function.arg_names
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for index, part in enumerate(self._parts):
            signature[names[index]] = part.signature()
            for position, leaf in enumerate(part.leaves):
                path = (index, position) if part.nested else (index,)
                if leaf is None:
                    constants[path] = None
                elif aligned and (isinstance(leaf, Address) or leaf.stride):
                    attributes[path] = [["tt.divisibility", ALIGNMENT]]
        for name, value in self.constants.items():
            signature[name] = "constexpr"
            constants[(names.index(name),)] = value
        return ASTSource(function, signature, constants, attributes)


class _Part:
    """One parameter: a leaf or a named tuple of leaves."""

    def __init__(self, argument: Any) -> None:
        self.nested = isinstance(argument, tuple) and not isinstance(argument, Number | Address)
        self.kind = type(argument) if self.nested else None
        self.leaves: tuple[Leaf, ...] = tuple(argument) if self.nested else (argument,)
        self._values = [leaf.value if isinstance(leaf, Number) else None for leaf in self.leaves]
        self._slots = [(at, leaf) for at, leaf in enumerate(self.leaves) if isinstance(leaf, Address)]

    def fill(self, pointers: dict[Address, Any]) -> Any:
        values = self._values.copy()
        for at, leaf in self._slots:
            values[at] = pointers[leaf]
        return self.kind._make(values) if self.kind else values[0]

    def signature(self) -> Any:
        kinds = [_kind(leaf) for leaf in self.leaves]
        return self.kind._make(kinds) if self.kind else kinds[0]


def _kind(leaf: Leaf) -> str:
    if leaf is None:
        return "constexpr"
    return leaf.kind if isinstance(leaf, Number) else "*" + TYPES[leaf.dtype]


class Kernel:
    """A kernel with its template, ready to launch. Compiled at the first launch, once per device and alignment."""

    def __init__(self, function: Any, template: Template, grid: tuple[int, int], options: dict[str, Any]) -> None:
        assert tuple(template.constants) == tuple(function.arg_names[len(template.arguments) :])
        self.function, self.template, self.grid, self.options = function, template, grid, options
        self._compiled: dict[tuple[int, bool], Any] = {}

    def run(self, call: Call) -> None:
        if 0 in self.grid:
            return
        pointer = call.adapter.pointer
        addresses = {leaf: pointer(getattr(call, leaf.name)) + leaf.offset for leaf in self.template.addresses}
        if interpreted():
            self._interpret(addresses)
        else:
            self._launch(addresses)

    def _interpret(self, addresses: dict[Address, int]) -> None:
        pointers = {leaf: _tensor(address, leaf.dtype) for leaf, address in addresses.items()}
        with np.errstate(all="ignore"):  # infinities and the wrapping integers of Philox
            self.function[self.grid](*self.template.values(pointers))

    def warmup(self) -> None:
        """Compiles it for the current device and arrays that are aligned."""
        if 0 not in self.grid:
            self._compile(triton.runtime.driver.active.get_current_device(), self.template.aligned_strides)

    def _launch(self, addresses: dict[Address, int]) -> None:
        active = triton.runtime.driver.active
        device = active.get_current_device()
        aligned = self.template.aligned_strides and all(address % ALIGNMENT == 0 for address in addresses.values())
        kernel = self._compiled.get((device, aligned)) or self._compile(device, aligned)
        stream = active.get_current_stream(device)
        values = self.template.values(addresses)
        kernel.run(*self.grid, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)

    def _compile(self, device: int, aligned: bool) -> Any:
        self._compiled[device, aligned] = found = compiled(self, device, aligned)
        return found


def run_all(kernels: Sequence[Kernel], call: Call, device: str) -> None:
    """In order, on the device of that torch name, whichever is current."""
    with current(device):
        for kernel in kernels:
            kernel.run(call)


def warmup_all(kernels: Sequence[Kernel], device: str) -> None:
    """Compiles them for the device of that torch name."""
    if not interpreted():
        with current(device):
            for kernel in kernels:
                kernel.warmup()


def current(device: str) -> AbstractContextManager[Any]:
    """Makes the device of that torch name the current one, where it is not."""
    kind, _, number = device.partition(":")
    if interpreted() or not number or int(number) == triton.runtime.driver.active.get_current_device():
        return nullcontext()
    import torch

    guard: AbstractContextManager[Any] = getattr(torch, kind).device(int(number))
    return guard


_cache: dict[Any, Any] = {}


def compiled(kernel: Kernel, device: int, aligned: bool) -> Any:
    """The compiled kernel, loaded; equal ones are shared by all plans.

    Raises:
        CompilationError: the compiler or the device refuses it.
    """
    key = (device, kernel.function, kernel.template.key, aligned, tuple(kernel.options.items()))
    found = _cache.get(key)
    if found is None:
        target = triton.runtime.driver.active.get_current_target()
        try:
            source = kernel.template.source(kernel.function, aligned)
            found = triton.compile(source, target=target, options=kernel.options)
            _ = found.run  # loads it, which fails where it wants more registers or shared memory than there are
        except Exception as error:
            raise CompilationError(f"{_variant(kernel)} on {target.backend} {target.arch}: {error}") from error
        _cache[key] = found
    return found


def _variant(kernel: Kernel) -> str:
    """What somebody needs to see the same failure."""
    constants = {**kernel.template.constants, **kernel.options}
    inside = ", ".join(f"{name}={value}" for name, value in constants.items())
    given = ", ".join(sorted(kernel.template.names))
    return f"Triton {triton.__version__} does not compile {kernel.function.__name__}({inside}) of {given}"


def _tensor(address: int, dtype: str) -> Any:
    """One element of host memory as a tensor: the interpreter only wants its address and dtype."""
    import torch

    kind = getattr(torch, "uint8" if dtype == "bool" else dtype)
    if not address:  # an array without elements
        return torch.empty(1, dtype=kind)
    return torch.frombuffer((ctypes.c_char * kind.itemsize).from_address(address), dtype=kind)
