"""Tuning of the Vulkan kernels: workgroup and tile sizes of a pipeline, by heuristics from device and problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...definition.problem import Problem
from .arrays import VECTOR
from .device_info import MATRICES, SCALAR, SHUFFLES, DeviceInfo
from .matrices import Shape
from .score_code import generate
from .tables import feature_bits


@dataclass(frozen=True, slots=True)
class Config:
    """Specialization constants of tables.glsl, and the module that uses them. DIM and DIM_V count vectors."""

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
    matrix: Shape | None = None
    subgroup: int = 0  # for matrices, which need subgroups of one size
    score: str = ""  # text of the functions that are linked into the module

    def constants(self) -> dict[int, int]:
        """Return the constants by specialization id."""
        numbers = (self.workgroup, self.dim, self.dim_v, self.lanes, self.rows, self.keys, self.features)
        constants = {**dict(enumerate(numbers)), 7: int(self.dtype == "bfloat16")}
        if self.matrix:
            constants |= {8: self.matrix.m, 9: self.matrix.n, 10: self.matrix.k}
        return constants

    @property
    def path(self) -> str:
        """Return the compute path; see DeviceInfo.paths."""
        return MATRICES if self.matrix else SHUFFLES if self.shuffle else SCALAR

    def module(self, shader: str) -> str:
        """Return the .spv file of this shader for the problem's dtype and the device's features."""
        if self.matrix:
            return f"{shader}_matrix_{'bf16' if self.dtype == 'bfloat16' else 'f16'}"
        return f"{shader}_{'16' if self.half else 'f32'}{'_shuffle' if self.shuffle else ''}"

    @property
    def half(self) -> bool:
        """Return whether values are stored as 16 bits."""
        return self.dtype != "float32"

    @property
    def tile(self) -> int:
        """Return the number of queries of a workgroup."""
        return self.workgroup // self.lanes * self.rows


ALL_FEATURES = 8191  # except functions, with which each module is compiled anyway
FEW_FLOPS = 5e7  # of one head; below this, a software driver takes longer to compile a kernel than to run it
GENERIC_DIM = 16
# Mesa's software driver silently ends a shader's loops after 65,535 iterations in total.
SOFTWARE_ITERATIONS = 60_000
FEW_WORKGROUPS = 256  # with fewer workgroups, keys are split
LEAST_SPLIT = 256
FEW_ROWS = 4  # with fewer rows, most of a matrix would be empty
MATRIX_KEYS = 32  # in one step
UNBOUNDED = 2**30
SHARED_TILES = 32  # number of tiles next to each other if all rows or keys share a bias; sum.comp adds them


def forward_config(info: DeviceInfo, problem: Problem) -> Config:
    """Return the configuration, which depends only on one sequence's sizes, so results do not depend on the batch."""
    config = scalar_config(info, problem)
    shape = _shape(info, problem)
    if shape is None:
        return config
    wide = replace(config, dim=_round(config.dim, shape.k // VECTOR), dim_v=_round(config.dim_v, shape.n // VECTOR))
    return matrix_config(info, wide, shape, "forward", problem.seqlen_q * problem.group) or config


def _shape(info: DeviceInfo, problem: Problem) -> Shape | None:
    """Return the matrix shape for this problem, or None if it has too few rows.

    It must not depend on other sequences.
    """
    if problem.seqlen_q * problem.group < FEW_ROWS and not problem.batch_invariant:
        return None
    return info.matrices.best(problem.dtype)


def matrix_config(info: DeviceInfo, scalar: Config, shape: Shape, shader: str, owned: int) -> Config | None:
    """Return the largest workgroup that fits and has rows (or keys) to own; None if there is none."""
    lanes = max(info.subgroup // shape.m, 1)
    rows = -(-shape.m * lanes // info.subgroup)
    config = replace(scalar, lanes=lanes, rows=rows, keys=MATRIX_KEYS, shuffle=False, matrix=shape)
    for subgroups in (4, 2, 1):
        config = replace(config, workgroup=subgroups * info.subgroup, subgroup=info.subgroup)
        needed = subgroups == 1 or config.tile // 2 < owned
        fits = config.workgroup <= info.invocations and shared_bytes(config, shader) <= info.shared_memory
        if needed and fits:
            return config
    return None


def shared_bytes(config: Config, shader: str) -> int:
    """Return the shared memory of the shader: staged tiles, scores, weights, and at most 40 bytes per row of a step."""
    tiles, scores, weights = {"forward": (1, 1, 1), "dq": (1, 2, 1), "dkdv": (2, 2, 2)}[shader]
    tile = config.keys * (max(config.dim, config.dim_v) + 2) * 8
    owned = scores * (config.keys + 4) * 4 + weights * (config.keys // 4 + 2) * 8
    return tiles * tile + config.tile * owned + 40 * config.keys


def scalar_config(info: DeviceInfo, problem: Problem) -> Config:
    """Return the configuration with one invocation, or several lanes, per row."""
    dim, dim_v = vectors(problem.head_dim), vectors(problem.head_dim_v)
    features = feature_bits(problem)
    if info.software:
        few = (
            problem.device == "cpu"
            and problem.seqlen_q * problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * 2.0 < FEW_FLOPS
        )
        if few and not problem.score:
            dim, dim_v = (_round(x, GENERIC_DIM) for x in (dim, dim_v))
            features = ALL_FEATURES
        rows = 1 if few else 4
        return Config(32, dim, dim_v, 1, rows, 4, features, problem.dtype, False, False, score=problem.score)
    lanes = 1
    while lanes < 8 and max(dim, dim_v) > 4 * lanes:
        lanes *= 2
    shuffle = info.shuffle and info.subgroup >= lanes
    dim, dim_v = _round(dim, lanes), _round(dim_v, lanes)
    workgroup, score = min(128, info.invocations), problem.score
    return Config(workgroup, dim, dim_v, lanes, 2, 4, features, problem.dtype, True, shuffle, score=score)


def split_keys(info: DeviceInfo, problem: Problem, config: Config) -> int:
    """Return the keys of one split; at least seqlen_k if keys are not split.

    Splits start at multiples of this number. Otherwise a sequence's result would depend on its batch.
    """
    if info.software:
        return _steps(_step_iterations(config)) * config.keys
    workgroups = problem.batch * problem.nheads_kv * -(-problem.seqlen_q * problem.group // config.tile)
    if problem.batch_invariant or workgroups >= FEW_WORKGROUPS:
        return max(problem.seqlen_k, 1)
    return max(LEAST_SPLIT, _round(-(-problem.seqlen_k * workgroups // FEW_WORKGROUPS), MATRIX_KEYS))


def _step_iterations(config: Config) -> int:
    """Return the iterations of all loops in one step of the forward pass over KEYS keys."""
    if config.matrix:
        return _matrix_iterations(config)
    return (config.dim + config.dim_v) // config.lanes + 1 + _function_iterations(config)


def _matrix_iterations(config: Config) -> int:
    """Return the iterations of one step of any shader: loading, products and weights."""
    assert config.matrix is not None
    vectors = config.dim + config.dim_v
    staged = -(-config.keys * vectors // config.workgroup) + config.keys
    tiles = config.keys // min(config.matrix.n, config.matrix.k)
    return staged + 2 * tiles * vectors + 2 * config.rows * config.keys + _function_iterations(config)


def _function_iterations(config: Config) -> int:
    """Return the iterations of loops in the score functions of one step, at most."""
    return config.rows * config.keys * generate(config.score).iterations if config.score else 0


def backward_configs(info: DeviceInfo, problem: Problem) -> dict[str, Config]:
    """Return the configurations by shader, all with the same number of vectors per row because they share memory."""
    base, own = scalar_config(info, problem), 2
    if info.software:
        own = base.rows
    else:
        lanes = min(_power_of_two(max(base.dim, base.dim_v) // 2), 16)
        base = replace(_with_row_step(base, lanes), lanes=lanes, shuffle=info.shuffle and info.subgroup >= lanes)
    shape = _shape(info, problem)
    if shape:
        base = _with_row_step(base, max(shape.n // VECTOR, shape.k // VECTOR, base.lanes))
    alone = replace(base, lanes=1, rows=1, keys=1, shuffle=False)
    found = {"dq": replace(base, rows=own, keys=4), "dkdv": replace(base, rows=4, keys=own)}
    if shape:
        owned = {"dq": problem.seqlen_q * problem.group, "dkdv": problem.seqlen_k}
        found = {name: matrix_config(info, x, shape, name, owned[name]) or x for name, x in found.items()}
    return {
        **found,
        "dbias": replace(alone, rows=2, keys=4),
        **dict.fromkeys(("delta", "sum", "store"), alone),
    }


def _with_row_step(config: Config, step: int) -> Config:
    """Return the configuration with rows of a multiple of `step` vectors."""
    return replace(config, dim=_round(config.dim, step), dim_v=_round(config.dim_v, step))


def owned_keys(config: Config) -> int:
    """Return the keys of a workgroup of dkdv."""
    return config.tile if config.matrix else config.workgroup // config.lanes * config.keys


def part_sizes(info: DeviceInfo, configs: Mapping[str, Config]) -> dict[str, int]:
    """Return the keys for dq, rows for dkdv, turns for dbias and terms for sum that one dispatch adds."""
    if not info.software:
        return dict.fromkeys(("dq", "dkdv", "dbias", "sum"), UNBOUNDED)
    dq, dkdv = configs["dq"], configs["dkdv"]
    dim, dim_v = dq.dim, dq.dim_v
    loops = {name: _function_iterations(configs[name]) for name in ("dq", "dkdv", "dbias")}
    steps = {
        "dq": (2 * dim + dim_v + 1 + loops["dq"], dq.keys),
        "dkdv": (2 * (dim + dim_v) + 1 + loops["dkdv"], dkdv.rows),
    }
    steps |= {name: (_matrix_iterations(x), x.keys) for name, x in configs.items() if x.matrix}
    return {
        **{name: _steps(iterations) * size for name, (iterations, size) in steps.items()},
        "dbias": _steps(dim + dim_v + 1 + loops["dbias"]),
        "sum": SOFTWARE_ITERATIONS * configs["sum"].workgroup,
    }


def _steps(iterations: int) -> int:
    """Return the steps of one dispatch of a software driver, if each has this many iterations."""
    return max(SOFTWARE_ITERATIONS // iterations, 1)


def bias_tiles(problem: Problem, config: Config) -> tuple[int, int]:
    """Return the numbers of adjacent tiles of queries and of keys in dbias.comp.

    They are all tiles, or some of them if queries (keys) share a bias.
    """
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
    """Return the largest power of two up to x, at least 1."""
    return 1 << max(x, 1).bit_length() - 1


def _round(x: int, step: int) -> int:
    return -(-x // step) * step
