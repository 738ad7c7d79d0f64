"""Sizes of workgroups and tiles: what a pipeline is built with, chosen from the device's properties and the problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...problem import Problem
from .arrays import VECTOR
from .device import DeviceInfo
from .tables import feature_bits


@dataclass(frozen=True, slots=True)
class Config:
    """The specialization constants of tables.glsl, and which module they go into. DIM and DIM_V count vectors."""

    workgroup: int
    dim: int
    dim_v: int
    lanes: int
    rows: int
    keys: int
    features: int
    dtype: str
    unroll: bool
    shuffle: bool

    def constants(self) -> dict[int, int]:
        """By specialization id."""
        numbers = (self.workgroup, self.dim, self.dim_v, self.lanes, self.rows, self.keys, self.features)
        return {**dict(enumerate(numbers)), 7: int(self.dtype == "bfloat16")}

    @property
    def half(self) -> bool:
        """Whether values lie in memory as 16 bits."""
        return self.dtype != "float32"

    @property
    def tile(self) -> int:
        """Rows of a workgroup."""
        return self.workgroup // self.lanes * self.rows


ALL_FEATURES = 8191
FEW_FLOPS = 5e7  # of one head: below, a software driver takes longer to compile a kernel than to run it
GENERIC_DIM = 16
# Mesa's software driver leaves a shader's loops, silently, when all of them together have done 65,535 iterations.
SOFTWARE_ITERATIONS = 60_000
FEW_WORKGROUPS = 256  # below, keys are split until there are as many
LEAST_SPLIT = 256
UNBOUNDED = 2**30
SHARED_TILES = 32  # side by side, where all rows or all keys share a bias: what is left to sum.comp


def forward_config(info: DeviceInfo, problem: Problem) -> Config:
    """Depends on nothing but one sequence's sizes, so a sequence's result does not depend on its batch."""
    dim, dim_v = vectors(problem.head_dim), vectors(problem.head_dim_v)
    features = feature_bits(problem)
    if info.software:
        few = (
            problem.device == "cpu"
            and problem.seqlen_q * problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * 2.0 < FEW_FLOPS
        )
        if few:
            dim, dim_v = (_round(x, GENERIC_DIM) for x in (dim, dim_v))
            features = ALL_FEATURES
        return Config(32, dim, dim_v, 1, 1 if few else 4, 4, features, problem.dtype, False, False)
    lanes = 1
    while lanes < 8 and max(dim, dim_v) > 4 * lanes:
        lanes *= 2
    shuffle = info.shuffle and info.subgroup >= lanes
    dim, dim_v = _round(dim, lanes), _round(dim_v, lanes)
    return Config(min(128, info.invocations), dim, dim_v, lanes, 2, 4, features, problem.dtype, True, shuffle)


def split_keys(info: DeviceInfo, problem: Problem, config: Config) -> int:
    """Keys of one split; at least seqlen_k: they are not split.

    Splits begin at multiples of it: without the first rule a sequence's result would depend on its batch.
    """
    if info.software:
        return SOFTWARE_ITERATIONS // ((config.dim + config.dim_v) // config.lanes + 1) * config.keys
    workgroups = problem.batch * problem.nheads_kv * -(-problem.seqlen_q * problem.group // config.tile)
    if problem.batch_invariant or workgroups >= FEW_WORKGROUPS:
        return max(problem.seqlen_k, 1)
    return max(LEAST_SPLIT, _round(-(-problem.seqlen_k * workgroups // FEW_WORKGROUPS), 8))


def backward_configs(info: DeviceInfo, problem: Problem) -> dict[str, Config]:
    """By shader; all with the same vectors of a row, so that they read the same memory."""
    base = forward_config(info, problem)
    if info.software:
        own = base.rows
    else:
        lanes = min(_power_of_two(max(base.dim, base.dim_v) // 2), 16)
        dim, dim_v = (_round(x, lanes) for x in (base.dim, base.dim_v))
        shuffle = info.shuffle and info.subgroup >= lanes
        base, own = replace(base, lanes=lanes, dim=dim, dim_v=dim_v, shuffle=shuffle), 2
    alone = replace(base, lanes=1, rows=1, keys=1, shuffle=False)
    return {
        "dq": replace(base, rows=own, keys=4),
        "dkdv": replace(base, rows=4, keys=own),
        "dbias": replace(alone, rows=2, keys=4),
        **dict.fromkeys(("delta", "sum", "store"), alone),
    }


def part_sizes(info: DeviceInfo, configs: Mapping[str, Config]) -> dict[str, int]:
    """Keys for dq, rows for dkdv, turns for dbias, terms for sum that one dispatch adds up."""
    if not info.software:
        return dict.fromkeys(("dq", "dkdv", "dbias", "sum"), UNBOUNDED)
    dq, dkdv = configs["dq"], configs["dkdv"]
    dim, dim_v = dq.dim, dq.dim_v
    return {
        "dq": SOFTWARE_ITERATIONS // (2 * dim + dim_v + 1) * dq.keys,
        "dkdv": SOFTWARE_ITERATIONS // (2 * (dim + dim_v) + 1) * dkdv.rows,
        "dbias": SOFTWARE_ITERATIONS // (dim + dim_v + 1),
        "sum": SOFTWARE_ITERATIONS * configs["sum"].workgroup,
    }


def bias_tiles(problem: Problem, config: Config) -> tuple[int, int]:
    """Tiles of rows and of keys side by side in dbias.comp: all, or some where all rows (keys) share a bias."""
    assert problem.bias is not None
    rows, keys = problem.bias.shape[2:]
    row_tiles, key_tiles = -(-problem.seqlen_q // config.rows), -(-problem.seqlen_k // config.keys)
    if rows == 1:
        row_tiles = min(row_tiles, SHARED_TILES)
    if keys == 1:
        key_tiles = min(key_tiles, SHARED_TILES)
    return row_tiles, key_tiles


def vectors(columns: int) -> int:
    return -(-columns // VECTOR)


def _power_of_two(x: int) -> int:
    """The largest up to x, at least 1."""
    return 1 << max(x, 1).bit_length() - 1


def _round(x: int, step: int) -> int:
    return -(-x // step) * step
