"""Choice and launch of the Hopper kernels: the problems that they support, their descriptors and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from triton.compiler import ASTSource

from ....definition.dtypes import DTYPES
from ....definition.problem import Array, Problem, contiguous
from ...base import Call
from .. import tuning
from ..arguments import key_bytes, sizes, statistics, tables
from ..device import Device, device
from ..launch import ALIGNMENT, Address, Kernel, Template, f32, i32, i64
from ..views import Schedule
from .dialect import GluonASTSource, TensorDescriptor, gl
from .forward import GROUPS, ROWS, attention_forward_hopper

HEAD_DIMS = (64, 128)
HALVES = ("float16", "bfloat16")
LARGEST_SEQLEN = 2**28  # sums of a few lengths stay below 2^31
LARGEST_STRIDE = 2**40  # bytes
TILE_K = 128
STAGES = 2
# Registers per thread at the start, before the kernel redistributes them: 384 threads, 64 Ki registers.
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}


def unsupported_reasons(problem: Problem) -> list[str]:
    """Return why the Hopper kernels do not support a forward problem, or []."""
    reasons = []
    if problem.dtype not in HALVES:
        reasons.append(f"supports {' and '.join(HALVES)}, got {problem.dtype}")
    if problem.head_dim not in HEAD_DIMS or problem.head_dim_v != problem.head_dim:
        reasons.append(f"supports head_dim = head_dim_v of {' or '.join(map(str, HEAD_DIMS))}")
    others = set(problem.variant.features) - {"right"}
    if others:
        reasons.append(f"does not support {', '.join(sorted(others))}")
    if problem.scale <= 0:
        reasons.append("supports a scale above 0")
    if problem.batch_invariant:
        reasons.append("does not support batch_invariant, because the strides of a batch may prevent it")
    if reasons:
        return reasons
    if max(problem.seqlen_q, problem.seqlen_k) > LARGEST_SEQLEN:
        reasons.append(f"supports up to {LARGEST_SEQLEN} queries and keys")
    if problem.seqlen_q <= tuning.DECODE_ROWS:
        reasons.append(f"leaves up to {tuning.DECODE_ROWS} queries to the decoding kernel")
    if 0 in (*problem.q.shape, count_visible_keys(problem)):
        reasons.append("has nothing to compute")
    if not all(has_mappable_strides(array) for array in (problem.q, problem.k, problem.v)):
        reasons.append("supports strides that are positive multiples of 16 bytes")
    return reasons


def forward_kernel(problem: Problem, portable: Kernel) -> Kernel:
    """Build the kernel of a supported problem. `portable` runs if the addresses of a call are not aligned."""
    keys = count_visible_keys(problem)
    gpu = device(problem.device)
    out = contiguous(problem.out_shape, problem.dtype)
    rows, pairs = GROUPS.value * ROWS.value, problem.batch * problem.nheads
    tiles = -(-problem.seqlen_q // rows)
    right = problem.interval.right
    arguments = (
        statistics("lse", contiguous(problem.lse_shape, "float32")),
        tables(problem),
        sizes(problem)._replace(seqlen_k=i32(keys)),
        None if right is None else i32(diagonal_offset(problem) + right + 1),
        f32(problem.scale),
        schedule(problem, tiles, pairs, gpu),
    )
    maps = (
        Map("q", problem.q, problem.seqlen_q, ROWS.value),
        Map("k", problem.k, keys, TILE_K),
        Map("v", problem.v, keys, TILE_K),
        Map("out", out, problem.seqlen_q, ROWS.value),
    )
    constants = {"HEAD_DIM": problem.head_dim, "TILE_K": TILE_K, "STAGES": STAGES, "LAST_FIRST": right is not None}
    return HopperKernel(arguments, maps, constants, (tiles * pairs, 1), portable)


def schedule(problem: Problem, tiles: int, pairs: int, gpu: Device) -> Schedule:
    section = tuning.section(pairs, key_bytes(problem), gpu.l2_bytes)
    return Schedule(i32(tiles), i32(section), i32(1), i64(0), i64(0))


def diagonal_offset(problem: Problem) -> int:
    """Return the key that query 0 is aligned with."""
    return 0 if problem.alignment == "top-left" else problem.seqlen_k - problem.seqlen_q


def count_visible_keys(problem: Problem) -> int:
    """Return the number of keys that some query attends to. The copy engine must not read memory beyond them."""
    right = problem.interval.right
    if right is None:
        return problem.seqlen_k
    return min(problem.seqlen_k, max(problem.seqlen_q + diagonal_offset(problem) + right, 0))


def has_mappable_strides(array: Array) -> bool:
    """Return whether the copy engine supports the strides (batch, row, head). An axis of size 1 may have any stride."""
    *steps, last = array.strides4()
    size = 2  # bytes of an element
    used = [step * size for step, count in zip(steps, array.shape, strict=False) if count > 1]
    return last == 1 and all(0 < step < LARGEST_STRIDE and step % ALIGNMENT == 0 for step in used)


class Map:
    """Array (batch, row, head, dim) as the copy engine addresses it: (batch, head, row, dim), with `rows` rows."""

    def __init__(self, name: str, array: Array, rows: int, tile: int) -> None:
        batch, _, heads, dim = array.shape
        self.address = Address(name, array.dtype)
        self.block = [1, 1, tile, dim]
        self.layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        steps = [step if count > 1 else dim for step, count in zip(array.strides4(), array.shape, strict=True)]
        shape, strides = [batch, heads, rows, dim], [steps[0], steps[2], steps[1], 1]
        self._checked = TensorDescriptor(Base(0, DTYPES[array.dtype].triton), shape, strides, self.block, self.layout)

    def signature(self) -> str:
        return f"tensordesc<{DTYPES[self.address.dtype].triton}[{','.join(map(str, self.block))}],{self.layout!r}>"

    def descriptor_at(self, address: int) -> Any:
        """Return the descriptor of an array at `address`. Only the address changes, so nothing is checked again."""
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self._checked.__dict__, base=Base(address, self._checked.base.dtype))
        return descriptor


class Base(NamedTuple):
    """Attributes of a tensor that a descriptor reads."""

    address: int
    dtype: str

    def data_ptr(self) -> int:
        return self.address


class MapTemplate(Template):
    """Template with descriptors between the other arguments and the constants."""

    def __init__(self, arguments: tuple[Any, ...], maps: tuple[Map, ...], constants: dict[str, Any]) -> None:
        super().__init__(arguments, constants)
        self.maps = maps
        self.plain = len(self.arguments)
        self.arguments = (*self.arguments, *maps)
        self.addresses += [map_.address for map_ in maps]
        self.names |= {map_.address.name for map_ in maps}
        self.key = (*self.key, tuple(map_.signature() for map_ in maps))  # type: ignore[assignment]

    def values(self, addresses: Sequence[Any]) -> list[Any]:
        values, mapped = super().values(addresses), addresses[-len(self.maps) :]
        values[self.plain : self.plain] = [
            map_.descriptor_at(address) for map_, address in zip(self.maps, mapped, strict=True)
        ]
        return values

    def source(self, function: Any, aligned: bool) -> ASTSource:
        source = super().source(function, aligned)
        types = dict(zip(function.arg_names[self.plain :], (map_.signature() for map_ in self.maps), strict=False))
        signature = {name: types.get(name) or source.signature[name] for name in function.arg_names}
        return GluonASTSource(function, signature, source.constants, source.attrs)


class HopperKernel(Kernel):
    """Hopper kernel.

    The copy engine needs addresses that are multiples of 16 bytes; otherwise the portable kernel runs.
    """

    def __init__(
        self,
        arguments: tuple[Any, ...],
        maps: tuple[Map, ...],
        constants: dict[str, Any],
        grid: tuple[int, int],
        portable: Kernel,
    ) -> None:
        super().__init__(attention_forward_hopper, MapTemplate(arguments, maps, constants), grid, OPTIONS)
        self._mapped = [map_.address.name for map_ in maps]
        self._portable = portable

    def launch(self, call: Call, device: int, stream: int) -> None:
        pointer = call.adapter.pointer
        if any(pointer(getattr(call, name)) % ALIGNMENT for name in self._mapped):
            self._portable.launch(call, device, stream)
        else:
            super().launch(call, device, stream)
