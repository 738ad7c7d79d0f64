"""Launch of kernels: from a kernel and its arguments to a running program, through Triton's compiler.

Arguments are described once per plan, as a Template of typed numbers and named addresses. The template gives the
signature of the compiled kernel, so that no size is ever specialised. Each call only fills in the addresses.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import triton
from triton.compiler import ASTSource

from ...definition.dtypes import DTYPES
from ...definition.errors import CompilationError
from ..base import Call
from .device import interpreted

LARGEST_STRIDE = 2**23  # times the rows of a tile (at most 128), plus the dimensions: below 2^31
ALIGNMENT = 16  # bytes; required by the widest loads. Strides are known to be multiples of up to this number
INTERPRETED = interpreted()  # decided when the kernels are imported


class Number(NamedTuple):
    """Runtime scalar. stride: the compiler may assume the common divisor of all strides."""

    kind: str
    value: float
    stride: bool = False


class Address(NamedTuple):
    """Address of the first element of a call's array, plus a number of bytes."""

    name: str
    dtype: str
    offset: int = 0


class Function(NamedTuple):
    """Function of Triton that a kernel calls. It is a constant of the compiled kernel."""

    function: Any


Leaf = Number | Address | Function | None


def i32(value: int) -> Number:
    return Number("i32", value)


def i64(value: int) -> Number:
    return Number("i64", value)


def f32(value: float) -> Number:
    return Number("fp32", float(np.float32(value)))


def stride(value: int) -> Number:
    """Return a stride, in 32 bits if offsets inside a tile fit into them."""
    return Number("i32" if abs(value) < LARGEST_STRIDE else "i64", value, True)


class Template:
    """Arguments of one kernel: leaves and named tuples of leaves, then constants."""

    def __init__(self, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        self.arguments = tuple(arguments)
        self.constants = constants
        self._parts = [_Part(argument) for argument in arguments]
        strides = [
            int(leaf.value) for part in self._parts for leaf in part.leaves if isinstance(leaf, Number) and leaf.stride
        ]
        self.divisor = math.gcd(ALIGNMENT, *strides)
        self.addresses = [leaf for part in self._parts for leaf in part.leaves if isinstance(leaf, Address)]
        self.names = {leaf.name for leaf in self.addresses}
        functions = tuple([leaf for part in self._parts for leaf in part.leaves if isinstance(leaf, Function)])
        self.key = (tuple(part.signature() for part in self._parts), tuple(constants.items()), self.divisor, functions)
        self._values = [part.value for part in self._parts] + list(constants.values())
        self._open: list[tuple[int, _Part, list[int]]] = []  # index of a part, and indices of its addresses among all
        first = 0
        for at, part in enumerate(self._parts):
            if part.slots:
                self._open.append((at, part, list(range(first, first + len(part.slots)))))
                first += len(part.slots)

    def values(self, addresses: Sequence[Any]) -> list[Any]:
        """Return the launcher's arguments for these addresses, in the order of `self.addresses`."""
        values = self._values.copy()
        for at, part, places in self._open:
            values[at] = (addresses[places[0]], *part.rest) if part.rest else part.fill(addresses, places)
        return values

    def source(self, function: Any, aligned: bool) -> ASTSource:
        """Return the source for the compiler."""
        names = function.arg_names
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for index, part in enumerate(self._parts):
            signature[names[index]] = part.signature()
            for position, leaf in enumerate(part.leaves):
                path = (index, position) if part.nested else (index,)
                if leaf is None or isinstance(leaf, Function):
                    constants[path] = leaf and leaf.function
                elif aligned and (isinstance(leaf, Address) or leaf.stride):
                    divisor = ALIGNMENT if isinstance(leaf, Address) else self.divisor
                    attributes[path] = [["tt.divisibility", divisor]]
        for name, value in self.constants.items():
            signature[name] = "constexpr"
            constants[(names.index(name),)] = value
        return ASTSource(function, signature, constants, attributes)


class _Part:
    """Parameter of a kernel: a leaf or a named tuple of leaves, with names for kernels that run in Python."""

    def __init__(self, argument: Any) -> None:
        self.nested = isinstance(argument, tuple) and not isinstance(argument, Number | Address | Function)
        self.kind = type(argument) if self.nested else None
        self.leaves: tuple[Leaf, ...] = tuple(argument) if self.nested else (argument,)
        self.slots = [at for at, leaf in enumerate(self.leaves) if isinstance(leaf, Address)]
        self._values = [_value(leaf) for leaf in self.leaves]
        self._make: Any = self.kind._make if self.kind and INTERPRETED else tuple
        self.value = self._make(self._values) if self.nested else self._values[0]
        # Everything after the first address is constant, as in a View; this is the most common case.
        self.rest = tuple(self._values[1:]) if self.slots == [0] and self._make is tuple else ()

    def fill(self, addresses: Sequence[Any], places: Sequence[int]) -> Any:
        """Return the value with addresses[places] filled in."""
        if not self.nested:
            return addresses[places[0]]
        values = self._values.copy()
        for at, place in zip(self.slots, places, strict=True):
            values[at] = addresses[place]
        return self._make(values)

    def signature(self) -> Any:
        kinds = [_kind(leaf) for leaf in self.leaves]
        return self.kind._make(kinds) if self.kind else kinds[0]


def _value(leaf: Leaf) -> Any:
    """Return the launcher's argument of a leaf; None for an address, which each call fills in, and for a constant."""
    if isinstance(leaf, Function):
        return leaf.function if INTERPRETED else None
    return leaf.value if isinstance(leaf, Number) else None


def _kind(leaf: Leaf) -> str:
    if leaf is None or isinstance(leaf, Function):
        return "constexpr"
    return leaf.kind if isinstance(leaf, Number) else "*" + DTYPES[leaf.dtype].triton


class Kernel:
    """Kernel with its template, ready to launch. It is compiled at the first launch, once per device and alignment."""

    def __init__(self, function: Any, template: Template, grid: tuple[int, int], options: dict[str, Any]) -> None:
        assert tuple(template.constants) == tuple(function.arg_names[len(template.arguments) :])
        self.function, self.template, self.grid, self.options = function, template, grid, options
        self.empty = 0 in grid
        self._where = [(leaf.name, leaf.offset) for leaf in template.addresses]
        self._compiled: dict[tuple[int, bool], Any] = {}

    def addresses(self, call: Call) -> list[int]:
        pointer = call.adapter.pointer
        return [pointer(getattr(call, name)) + offset for name, offset in self._where]

    def interpret(self, call: Call) -> None:
        addresses = zip(self.addresses(call), self.template.addresses, strict=True)
        tensors = [_tensor(address, leaf.dtype) for address, leaf in addresses]
        with np.errstate(all="ignore"):  # no warnings for infinities and the wrapping integers of Philox
            self.function[self.grid](*self.template.values(tensors))

    def warmup(self) -> None:
        """Compile the kernel for the current device and aligned arrays."""
        if not self.empty:
            self._compile(triton.runtime.driver.active.get_current_device(), True)

    def launch(self, call: Call, device: int, stream: int) -> None:
        """Launch the kernel on the current device."""
        addresses, bits = self.addresses(call), 0
        for address in addresses:
            bits |= address
        aligned = bits % ALIGNMENT == 0
        kernel = self._compiled.get((device, aligned)) or self._compile(device, aligned)
        values = self.template.values(addresses)
        kernel.run(*self.grid, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)

    def _compile(self, device: int, aligned: bool) -> Any:
        self._compiled[device, aligned] = found = compiled(self, device, aligned)
        return found


def run_all(kernels: Sequence[Kernel], call: Call, device: str) -> None:
    """Run the kernels in order on the device of that torch name."""
    wanted = [kernel for kernel in kernels if not kernel.empty]
    if INTERPRETED:
        for kernel in wanted:
            kernel.interpret(call)
        return
    active = triton.runtime.driver.active
    index, number = active.get_current_device(), device_number(device)
    if number not in (index, None):
        with torch_device(device):
            run_all(kernels, call, device)
        return
    stream = active.get_current_stream(index)
    for kernel in wanted:
        kernel.launch(call, index, stream)


def warmup_all(kernels: Sequence[Kernel], device: str) -> None:
    """Compile the kernels for the device of that torch name."""
    if not INTERPRETED:
        with torch_device(device):
            for kernel in kernels:
                kernel.warmup()


@cache
def device_number(name: str) -> int | None:
    """Return the number of a device, for example 1 for "cuda:1"; None for the current device."""
    number = name.partition(":")[2]
    return int(number) if number else None


def torch_device(name: str) -> AbstractContextManager[Any]:
    """Return a context in which the device of that torch name is the current one."""
    number = device_number(name)
    if number is None:
        return nullcontext()
    import torch

    guard: AbstractContextManager[Any] = getattr(torch, name.partition(":")[0]).device(number)
    return guard


_cache: dict[Any, Any] = {}


def compiled(kernel: Kernel, device: int, aligned: bool) -> Any:
    """Return the compiled and loaded kernel. Plans share equal kernels.

    Raises:
        CompilationError: the compiler or the device refuses the kernel.
    """
    key = (device, kernel.function, kernel.template.key, aligned, tuple(kernel.options.items()))
    found = _cache.get(key)
    if found is None:
        target = triton.runtime.driver.active.get_current_target()
        try:
            source = kernel.template.source(kernel.function, aligned)
            found = triton.compile(source, target=target, options=kernel.options)
            _ = found.run  # loads the kernel, which fails if it needs more registers or shared memory than available
        except Exception as error:
            raise CompilationError(f"{_variant(kernel)} on {target.backend} {target.arch}: {error}") from error
        _cache[key] = found
    return found


def _variant(kernel: Kernel) -> str:
    """Return a description with which others can reproduce the failure."""
    constants = {**kernel.template.constants, **kernel.options}
    inside = ", ".join(f"{name}={value}" for name, value in constants.items())
    given = ", ".join(sorted(kernel.template.names))
    return f"Triton {triton.__version__} does not compile {kernel.function.__name__}({inside}) of {given}"


def _tensor(address: int, dtype: str) -> Any:
    """Return one element of host memory as a tensor, because the interpreter only needs its address and dtype."""
    import torch

    kind = getattr(torch, "uint8" if dtype == "bool" else dtype)
    if not address:  # array without elements
        return torch.empty(1, dtype=kind)
    return torch.frombuffer((ctypes.c_char * kind.itemsize).from_address(address), dtype=kind)
