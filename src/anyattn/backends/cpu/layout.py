"""Layout of the C struct `anyattn_call` (anyattn.h): one table of fields, their formats and offsets."""

from __future__ import annotations

import struct
from collections.abc import Mapping

_FIRST_ARRAYS = (
    "q", "k", "v", "out", "lse", "bias", "mask", "alibi_slopes", "sink", "dout", "dlse", "dq", "dk", "dv", "dbias",
    "dsink",
    "new_k", "new_v", "rotary_cos", "rotary_sin",
)  # fmt: skip
_TANGENTS = ("tq", "tk", "tv", "tbias", "tsink", "tout", "tlse")
_SCALES = ("k_scale", "v_scale")
_CAPTURED = ("captured", "captured_indices", "dcaptured")
ARRAYS = (*_FIRST_ARRAYS, "kv_indices", *_TANGENTS, *_CAPTURED, *_SCALES)
# Results of the second pass that the struct names like results of the tangent pass.
_SAME = {"ddout": "tout", "ddlse": "tlse"}
TABLES = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "offset", "block_table", "cache_batch_idx",
    "cache_seqlens", "rng_state",
)  # fmt: skip
SIZES = (
    "batch", "seqlen_q", "seqlen_k", "nheads", "nheads_kv", "head_dim", "head_dim_v", "total_q", "total_k", "batch_k",
    "num_pages", "page_size", "max_pages",
)  # fmt: skip
POINTER = "Q"

_ARRAY = (("data", POINTER), *((f"stride{axis}", "q") for axis in range(4)), ("dtype", "i"), ("reserved", "i"))
FIELDS: tuple[tuple[str, str], ...] = (
    *(("size", "I"), ("flags", "I"), ("num_threads", "i"), ("target", "i")),
    *((name, "q") for name in SIZES),
    *((name, "d") for name in ("scale", "softcap")),
    *((name, "q") for name in ("left", "right", "chunk", "query_start", "key_start")),
    *(("dropout_threshold", "I"), ("rotary_dim", "i")),
    *((f"{array}.{name}", kind) for array in _FIRST_ARRAYS for name, kind in _ARRAY),
    *((name, "q") for name in ("seqlen_new", "rotary_positions")),
    *((name, POINTER) for name in TABLES),
    *(("workspace", POINTER), ("workspace_bytes", "q"), ("parallel_for", POINTER), ("parallel_for_user", POINTER)),
    *(("message", POINTER), ("message_bytes", "q")),
    *((f"kv_indices.{name}", kind) for name, kind in _ARRAY),
    *(("num_indices", "q"), ("poll", POINTER), ("poll_user", POINTER)),
    *((f"{array}.{name}", kind) for array in _TANGENTS for name, kind in _ARRAY),
    *(("score_program", POINTER), ("score_words", "q"), ("num_captured", "q"), ("num_captured_indices", "q")),
    *((f"{array}.{name}", kind) for array in (*_CAPTURED, "mask_blocks") for name, kind in _ARRAY),
    *(("mask_block_q", "q"), ("mask_block_k", "q")),
    *((f"{array}.{name}", kind) for array in _SCALES for name, kind in _ARRAY),
)
# Native byte order and alignment. The order above aligns every field, in C and here.
STRUCT = struct.Struct("@" + "".join(kind for _, kind in FIELDS))
SIZE = STRUCT.size


def field_of(array: str) -> str:
    """Return the name of an array in the struct."""
    return _SAME.get(array, array)


def offset(name: str) -> int:
    """Return the bytes from the start of the struct to a field."""
    index = [field for field, _ in FIELDS].index(name)
    kinds = "".join(kind for _, kind in FIELDS[: index + 1])
    return struct.calcsize("@" + kinds) - struct.calcsize(FIELDS[index][1])


def pack(values: Mapping[str, float]) -> bytes:
    """Return the struct with these fields, and zero in all others."""
    unknown = values.keys() - {name for name, _ in FIELDS}
    assert not unknown, unknown
    return STRUCT.pack(*[values.get(name, 0) for name, _ in FIELDS])
