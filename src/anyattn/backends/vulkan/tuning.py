"""Sizes of workgroups and tiles: what a pipeline is built with, chosen from the device's properties and the problem."""

from __future__ import annotations

from dataclasses import dataclass

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


def forward_config(info: DeviceInfo, problem: Problem) -> Config:
    """Depends on nothing but one sequence's sizes, so a sequence's result does not depend on its batch."""
    dim, dim_v = vectors(problem.head_dim), vectors(problem.head_dim_v)
    features = feature_bits(problem)
    if info.software:
        few = problem.seqlen_q * problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * 2.0 < FEW_FLOPS
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


def vectors(columns: int) -> int:
    return -(-columns // VECTOR)


def _round(x: int, step: int) -> int:
    return -(-x // step) * step
