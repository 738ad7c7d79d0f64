"""Data for shaders/include/tables.glsl: a block of numbers per call, and a row of numbers per head."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition import philox
from ...definition.problem import Problem
from ...definition.sequences import Sequence
from .arrays import VECTOR, Region

STRIDED = ("q", "k", "v", "out", "dq", "dk", "dv")
HEADER: tuple[tuple[str, str], ...] = (
    ("features", "i"),
    *((name, "i") for name in ("nheads", "group", "left", "right", "chunk")),
    *(("scale", "f"), ("softcap", "f"), ("threshold", "I"), ("keep_scale", "f")),
    *((name, "I") for name in ("seed_low", "seed_high", "rng_offset")),
    *((name, "i") for name in ("page_size", "max_pages", "pages_at", "rows_q")),
    *((f"{array}_{axis}", "I") for array in STRIDED for axis in ("head", "batch", "row")),
    *(("lse_head", "I"), ("lse_batch", "I")),
    *((f"{array}_{axis}", "I") for array in ("bias", "mask", "dbias") for axis in ("head", "batch", "row", "key")),
    *(("row_tiles", "i"), ("key_tiles", "i"), ("row_tile", "I"), ("key_tile", "I"), ("seqlen_k", "i")),
    *(("partial_split", "I"), ("partial_lse_split", "I")),
    *((name, "i") for name in ("rotary_dim", "interleaved")),
)
HEADER_STRUCT = struct.Struct("=" + "".join(kind for _, kind in HEADER))
SEQUENCE_INTS = 8
FEATURES = {
    **{"left": 1, "right": 2, "chunk": 4, "softcap": 8, "alibi": 16, "sink": 32, "dropout": 64, "paged": 128},
    **{"mask": 256, "bias_f32": 512, "bias_16": 1024, "split": 2048, "dlse": 4096, "function": 8192},
}
SPLIT = FEATURES["split"]
FARTHEST = 2**29  # larger offsets would overflow the shaders' positions
SOFTCAP_LIMITS = (1e-30, 1e30)  # limits that keep tanh's argument and its product finite
FLOAT_MAX = 3.4028234663852886e38

Values = dict[str, float]


def feature_bits(problem: Problem) -> int:
    """Return the feature bits of tables.glsl that this problem needs."""
    names = [name for name in problem.variant.features if name in FEATURES]
    if problem.bias is not None:
        names.append("bias_f32" if problem.bias.dtype == "float32" else "bias_16")
    if problem.dlse is not None:
        names.append("dlse")
    if problem.score:
        names.append("function")
    return sum(FEATURES[name] for name in names)


def problem_values(problem: Problem, regions: Mapping[str, Region]) -> Values:
    """Return the header fields that do not change between calls."""
    interval = problem.interval
    low, high = SOFTCAP_LIMITS
    values: Values = {
        "features": feature_bits(problem),
        "nheads": problem.nheads,
        "group": problem.group,
        "left": _clamp(interval.left),
        "right": _clamp(interval.right),
        "chunk": _clamp(interval.chunk),
        "scale": min(max(problem.scale, -FLOAT_MAX), FLOAT_MAX),
        "softcap": min(max(problem.softcap, low), high) if problem.softcap > 0 else 0.0,
        "threshold": problem.dropout_threshold,
        "keep_scale": philox.keep_scale(problem.dropout_p),
        "page_size": max(problem.page_size, 1),
        "max_pages": problem.block_table.shape[1] if problem.block_table is not None else 0,
        "pages_at": SEQUENCE_INTS * problem.batch,
        "seqlen_k": problem.seqlen_k,
        "rows_q": problem.q.shape[0] if problem.packed_q else problem.seqlen_q,
    }
    for name, region in regions.items():
        if name in STRIDED:
            strides = [stride // VECTOR for stride in region.strides[:3]]
            values |= dict(zip((f"{name}_head", f"{name}_batch", f"{name}_row"), strides, strict=True))
        elif name == "lse":
            values |= {"lse_head": region.strides[0], "lse_batch": region.strides[1]}
        elif name in ("bias", "mask", "dbias"):
            names = [f"{name}_{axis}" for axis in ("head", "batch", "row", "key")]
            values |= dict(zip(names, region.strides, strict=True))
    return values


def pack(values: Values, rng_state: npt.NDArray[np.int64] | None, rest: npt.NDArray[np.int32]) -> bytes:
    """Return the complete block."""
    if rng_state is not None:
        seed, offset = (int(word) & 0xFFFFFFFFFFFFFFFF for word in rng_state)
        words = {"seed_low": seed & 0xFFFFFFFF, "seed_high": seed >> 32, "rng_offset": offset & 0xFFFFFFFF}
        values = values | words
    unknown = values.keys() - {name for name, _ in HEADER}
    assert not unknown, unknown
    header = HEADER_STRUCT.pack(*[values.get(name, 0) for name, _ in HEADER])
    return header + rest.tobytes()


def sequence_rows(problem: Problem, found: list[Sequence]) -> npt.NDArray[np.int32]:
    """Return (batch, 8): n_q, n_k, leftpad, offset, and the start of queries and keys: batch entry and row of each.

    Raises:
        ValueError: an offset is too large.
    """
    rows = np.empty((problem.batch, SEQUENCE_INTS), np.int32)
    for s in found:
        if abs(s.offset) > FARTHEST:
            raise ValueError(f"offset[{s.number}] must be from -2^29 to 2^29 on the vulkan backend, got {s.offset}.")
        batch_q = 0 if problem.packed_q else s.number
        batch_k = 0 if problem.packed_k or problem.paged else s.batch_k
        rows[s.number] = (s.n_q, s.n_k, s.leftpad, s.offset, batch_q, s.row_q, batch_k, s.row_k)
    return rows


def head_rows(problem: Problem, slopes: Any, sink: Any) -> npt.NDArray[np.float32]:
    """Return (batch, nheads, 2): ALiBi slope and sink logit."""
    rows = np.zeros((problem.batch, problem.nheads, 2), np.float32)
    if slopes is not None:
        rows[..., 0] = slopes
    if sink is not None:
        rows[..., 1] = sink
    return rows


def _clamp(bound: int | None) -> int:
    """Return the bound, limited to 2^30, which is beyond every position."""
    return 0 if bound is None else min(max(bound, -(2**30)), 2**30)
