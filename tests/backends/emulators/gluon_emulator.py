"""Runs the Python of a Gluon kernel for Hopper on NumPy arrays: Triton's interpreter knows no Gluon.

Each warp partition is a thread, of which one runs at a time. At every barrier, copy and product a seed decides who goes
on: a partition whose wait is over, a copy in flight, or the product of a warpgroup that was issued first. Everyone has
a pace that is drawn too, from slow to fast. So a run is one of the orders that hardware may take, and a program that
waits for too little or too much is wrong in some of them:

* a tile in shared memory is NaN from the moment a copy into it is issued until that copy is done;
* a product reads its operands only when it is done, and its result can be had only from a wait;
* what threads wrote to shared memory must be fenced before the copy engine reads it;
* when nobody can go on, or something is in flight at the end, that is an error.

Layouts are not looked at: the compiler checks those. Integers are not negative where they are divided, as Python and
hardware round differently there.
"""

from __future__ import annotations

import math
import operator
import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

ROUNDED = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "int64": np.int64}


class WrongProgramError(Exception):
    """The kernel did what no schedule allows."""


class Value:
    """A tensor or scalar in registers: float32 (rounded values of narrower types, too) or an integer."""

    def __init__(self, data: Any) -> None:
        array = np.asarray(data)
        self.data = array.astype(np.float32) if array.dtype.kind == "f" else array

    def to(self, dtype: str) -> Value:
        return Value(self.data.astype(ROUNDED[dtype]).astype(np.int64 if dtype == "int64" else np.float32))

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    __hash__ = None  # type: ignore[assignment]


def data(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value


def _divide(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if np.min(a) < 0 or np.min(b) <= 0:
        raise WrongProgramError(f"integer division of {a} by {b}")
    return function(a, b)


def _define(name: str, function: Callable[[Any, Any], Any]) -> None:
    def left(self: Value, other: Any) -> Any:
        return other.__radd__(self) if isinstance(other, Pointer) else Value(function(self.data, data(other)))

    setattr(Value, f"__{name}__", left)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Value, f"__r{name}__", lambda self, other: Value(function(data(other), self.data)))


for _name in ("add", "sub", "mul", "truediv", "and", "xor", "lt", "le", "gt", "ge", "eq", "ne"):
    _define(_name, getattr(operator, f"{_name}_" if _name == "and" else _name))
_define("floordiv", lambda a, b: _divide(operator.floordiv, a, b))
_define("mod", lambda a, b: _divide(operator.mod, a, b))


class Pointer:
    """A pointer to the start of an array in flat memory, or an array of addresses."""

    def __init__(self, memory: np.ndarray, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + data(other))

    __radd__ = __add__


class Shared:
    """A tile of shared memory, or a view of one."""

    def __init__(self, array: np.ndarray, machine: Machine) -> None:
        self.array, self.machine = array, machine

    def index(self, number: Any) -> Shared:
        return Shared(self.array[int(number)], self.machine)

    def reshape(self, shape: Sequence[int]) -> Shared:
        view = self.array.view()
        view.shape = tuple(shape)  # never a copy
        return Shared(view, self.machine)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.array.transpose(order), self.machine)

    def store(self, value: Value) -> None:
        self.array[...] = value.data
        self.machine.current.unfenced = True


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have arrived."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.missing, self.bytes, self.phase = name, 0, 0, 0, 0

    def index(self, number: Any) -> Barrier:
        raise WrongProgramError(f"{self.name} is one barrier")

    def change(self, arrivals: int, more: int) -> None:
        self.missing -= arrivals
        self.bytes += more
        if not self.count or self.missing < 0:
            raise WrongProgramError(f"{self.name}: {-self.missing} arrivals too many")
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count


class BarrierArray:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, number: Any) -> Barrier:
        return self.barriers[int(number)]


class Product:
    """The accumulator of a product that may not be done."""

    def __init__(self) -> None:
        self.result: Value | None = None


class Event(NamedTuple):
    """Something in flight: what happens at its end, and how soon that is likely to be."""

    finish: Callable[[], None]
    pace: float


class Partition:
    """A thread that runs when the machine lets it, until its next operation that others can notice."""

    def __init__(self, name: str, body: Callable[[], object], pace: float) -> None:
        self.name, self.pace, self.waiting, self.ready = name, pace, "start", lambda: True
        self.products: list[Event] = []
        self.stores: list[Event] = []
        self.unfenced = self.done = self.stopped = False
        self.error: BaseException | None = None
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self.thread.start()

    def _run(self, body: Callable[[], object]) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                with np.errstate(all="ignore"):
                    body()
        except BaseException as error:
            self.error = error
        self.done = True
        self.back.release()

    def resume(self) -> None:
        self.go.release()
        self.back.acquire()
        if self.error:
            raise self.error

    def pause(self, what: str, ready: Callable[[], bool] = lambda: True) -> None:
        self.waiting, self.ready = what, ready
        self.back.release()
        self.go.acquire()
        if self.stopped:
            raise SystemExit

    def stop(self) -> None:
        """Ends the thread of a partition that will not go on."""
        self.stopped = True
        self.go.release()
        self.thread.join()


class Machine:
    """One processor and its copy engine. `broken`: pairs (operation, barrier) that are left out."""

    def __init__(self, seed: int, broken: frozenset[tuple[str, str]] = frozenset()) -> None:
        self.random, self.broken = random.Random(seed), broken
        self.partitions: list[Partition] = []
        self.loads: list[Event] = []
        self.current: Any = types.SimpleNamespace(pause=lambda *_: None, unfenced=False)
        self.program = 0

    def specialize(self, partitions: Sequence[tuple[Callable[..., object], tuple[Any, ...]]], *_: Any) -> None:
        outer = self.current
        self.partitions = [
            Partition(f"{body.__name__} {number}", lambda body=body, given=given: body(*given), self.pace())
            for number, (body, given) in enumerate(partitions)
        ]
        try:
            while not all(partition.done for partition in self.partitions):
                self._step()
        finally:
            for partition in self.partitions:
                partition.stop()
        self.current = outer
        if self.loads or any(partition.products or partition.stores for partition in self.partitions):
            raise WrongProgramError("the program ends while something is in flight")

    def pace(self) -> float:
        return self.random.choice((0.01, 1.0, 100.0))

    def event(self, finish: Callable[[], None]) -> Event:
        return Event(finish, self.pace())

    def _step(self) -> None:
        """One partition goes on, or one thing in flight is done: of a warpgroup's products the first."""
        live = [partition for partition in self.partitions if not partition.done]
        ready = [partition for partition in live if partition.ready()]
        queues = [self.loads, *(partition.stores for partition in self.partitions)]
        flying = [(queue, event) for queue in queues for event in queue]
        flying += [(partition.products, partition.products[0]) for partition in self.partitions if partition.products]
        if not ready and not flying:
            waits = (f"{partition.name} {partition.waiting}" for partition in live)
            raise WrongProgramError("nobody can go on: " + "; ".join(waits))
        paces = [partition.pace for partition in ready] + [event.pace for _, event in flying]
        chosen = self.random.choices(range(len(paces)), paces)[0]
        if chosen < len(ready):
            self.current = ready[chosen]
            self.current.resume()
        else:
            queue, event = flying[chosen - len(ready)]
            queue.remove(event)
            event.finish()

    # Barriers

    def arrive(self, barrier: Barrier, *, count: int = 1) -> None:
        self.current.pause(f"arrives at {barrier.name}")
        if ("arrive", barrier.name.split("[")[0]) not in self.broken:
            barrier.change(count, 0)

    def expect(self, barrier: Barrier, size: int) -> None:
        self.current.pause(f"expects at {barrier.name}")
        barrier.change(1, size)

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if pred and ("wait", barrier.name.split("[")[0]) not in self.broken:
            parity = int(phase)
            self.current.pause(f"waits for {barrier.name}, phase {parity}", lambda: barrier.phase & 1 != parity)

    # Copies

    def load(self, source: Descriptor, place: Sequence[Any], barrier: Barrier, target: Shared) -> None:
        self.current.pause("loads")
        target.array[...] = np.nan
        values = source.block(place)[0]

        def finish() -> None:
            target.array[...] = 0
            target.array[tuple(slice(size) for size in values.shape)] = values
            barrier.change(0, -target.array.size * 2)

        self.loads.append(self.event(finish))

    def store(self, target: Descriptor, place: Sequence[Any], source: Shared) -> None:
        if self.current.unfenced:
            raise WrongProgramError("the copy engine may not see what was written: no fence")

        def finish() -> None:
            values, _ = target.block(place)
            values[...] = source.array[tuple(slice(size) for size in values.shape)]

        self.current.stores.append(self.event(finish))
        self.current.pause("stores")

    def store_wait(self, left: int) -> None:
        partition = self.current
        partition.pause("waits for stores", lambda: len(partition.stores) <= left)

    def fence(self) -> None:
        self.current.unfenced = False

    # Products

    def multiply(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        product = Product()

        def finish() -> None:
            before = data(acc.result if isinstance(acc, Product) else acc) if use_acc else np.float32(0)
            left = a.array if isinstance(a, Shared) else a.data
            product.result = Value(before + left @ b.array)

        self.current.products.append(self.event(finish))
        self.current.pause("multiplies")
        return product

    def multiply_wait(self, left: int, deps: Sequence[Any]) -> Any:
        partition = self.current
        partition.pause("waits for products", lambda: len(partition.products) <= left)
        results = tuple(dep.result if isinstance(dep, Product) else dep for dep in deps)
        if any(result is None for result in results):
            raise WrongProgramError("a result is used before its product is done")
        return results if len(results) > 1 else results[0]


class Descriptor:
    """A tensor descriptor: shape and strides of an array in flat memory, as the plan states them."""

    def __init__(self, given: Any) -> None:
        pointer = given.base.data_ptr()
        size = pointer.memory.itemsize
        self.view = np.lib.stride_tricks.as_strided(
            pointer.memory[pointer.offset :], given.shape, [step * size for step in given.strides]
        )
        self.tile, self.layout, self.dtype = given.block_shape, None, given.base.dtype
        self.block_type = types.SimpleNamespace(nbytes=2 * math.prod(given.block_shape))

    def block(self, place: Sequence[Any]) -> tuple[np.ndarray, Sequence[int]]:
        """Return the part of a tile inside the array."""
        starts = [int(start) for start in place]
        inside = tuple(slice(start, start + size) for start, size in zip(starts, self.tile, strict=True))
        return self.view[inside], self.tile


def language(machine: Machine) -> dict[str, Any]:
    """Return the emulated functions by the names that the kernels use."""
    names = iter(("q_full", "k_full", "k_empty", "v_full", "v_empty", "turn"))

    def allocate(dtype: str, shape: Sequence[int], layout: Any) -> Any:
        if layout != "barrier":
            return Shared(np.full(shape, np.nan, np.float32), machine)
        name = next(names)
        barriers = [Barrier(f"{name}[{number}]") for number in range(shape[0])]
        return BarrierArray(barriers) if len(shape) > 1 else barriers[0]

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def store(pointer: Pointer, value: Value, mask: Value) -> None:
        pointer.memory[pointer.offset[mask.data]] = value.data[mask.data]

    def elementwise(function: Any) -> Callable[..., Value]:
        return lambda *values: Value(function(*(data(value) for value in values)))

    def anything(*_: Any, **__: Any) -> None:
        return None

    common = {
        "minimum": elementwise(np.fmin),
        "maximum": elementwise(np.fmax),
        "where": elementwise(np.where),
        "exp2": elementwise(np.exp2),
        "log2": elementwise(np.log2),
        "cdiv": lambda a, b: (Value(data(a)) + (b - 1)) // b,
        "program_id": lambda _: Value(machine.program),
        "static_range": range,
        "int64": "int64",
    }
    gl = types.SimpleNamespace(
        **common,
        float32="fp32",
        arange=lambda first, end, layout: Value(np.arange(first, end)),
        full=lambda shape, value, dtype, layout: Value(np.full(shape, value, np.float32)),
        zeros=lambda shape, dtype, layout: Value(np.zeros(shape, np.float32)),
        max=lambda value, axis: Value(np.fmax.reduce(value.data, axis)),
        sum=lambda value, axis: Value(value.data.sum(axis)),
        expand_dims=lambda value, axis: Value(np.expand_dims(data(value), axis)),
        convert_layout=lambda value, layout: value,
        store=store,
        allocate_shared_memory=allocate,
        warp_specialize=machine.specialize,
        NVMMADistributedLayout=anything,
        DotOperandLayout=anything,
        SliceLayout=anything,
    )
    mbarrier = types.SimpleNamespace(
        init=init, arrive=machine.arrive, expect=machine.expect, wait=machine.wait, MBarrierLayout=lambda: "barrier"
    )
    return {
        "gl": gl, "tl": types.SimpleNamespace(**common), "mbarrier": mbarrier, "fence_async_shared": machine.fence,
        "tma_load": machine.load, "tma_store": machine.store, "tma_store_wait": machine.store_wait,
        "warpgroup_mma": machine.multiply, "warpgroup_mma_wait": machine.multiply_wait,
    }  # fmt: skip


def translated(function: Any, names: dict[str, Any], known: dict[int, Any]) -> Any:
    """A kernel's Python with these names; other kernels that it calls likewise, and constants as numbers."""
    if id(function) not in known:
        scope: dict[str, Any] = {}
        known[id(function)] = types.FunctionType(function.fn.__code__, scope, function.fn.__name__)
        for name, value in function.fn.__globals__.items():
            if name not in names and hasattr(value, "fn") and hasattr(value, "arg_names"):
                value = translated(value, names, known)  # noqa: PLW2901
            scope[name] = names.get(name, value.value if type(value).__name__ == "constexpr" else value)
    return known[id(function)]


def launch(
    kernel: Any, memory: dict[str, Pointer], seed: int, broken: frozenset[tuple[str, str]] = frozenset()
) -> None:
    """Runs every program of a launch.Kernel, whose arrays begin at these pointers."""
    pointers = [memory[address.name] for address in kernel.template.addresses]
    given = [
        Descriptor(value) if hasattr(value, "block_shape") else value for value in kernel.template.values(pointers)
    ]
    for program in range(kernel.grid[0]):
        machine = Machine(seed + program, broken)
        machine.program = program
        translated(kernel.function, language(machine), {})(*given)
