"""What is asked: masks, arrays' metadata, the Problem, and its validation (values of tables: `sequences.py`)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import NamedTuple

from . import philox
from .mask import Mask

DTYPES = ("float32", "float16", "bfloat16", "float64")
ALIGNMENTS = ("bottom-right", "top-left")
# Array arguments of one call, in the order every layer passes them.
TABLES = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
    "offset",
    "block_table",
    "cache_batch_idx",
)
INPUTS = ("q", "k", "v", "bias", "mask", "alibi_slopes", "sink", *TABLES, "rng_state")
SAVED = ("out", "lse", "dout", "dlse")  # what the backward needs besides; dlse may be absent
POSITION_LIMIT = 2**31 - 1


class Array(NamedTuple):
    """Metadata of one array: strides in elements, dtype by name, device as text."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    def strides4(self) -> tuple[int, int, int, int]:
        """Strides as (batch, row, head, dim): packed arrays have no batch axis."""
        first, *rest = (0, *self.strides) if len(self.strides) == 3 else self.strides
        return (first, rest[0], rest[1], rest[2])


class Options(NamedTuple):
    """The scalars of a call. `left` and `right` are inclusive and None where unbounded; max_seqlen 0: not given."""

    scale: float | None = None
    softcap: float = 0.0
    left: int | None = None
    right: int | None = None
    chunk: int = 0
    alignment: str = "bottom-right"
    dropout_p: float = 0.0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    deterministic: bool = False
    batch_invariant: bool = False


class Variant(NamedTuple):
    """Key of compiled things: no sizes, no strides, no scalars."""

    dtype: str
    head_dim: int
    head_dim_v: int
    grouped: bool
    features: tuple[str, ...]


class Problem(NamedTuple):
    """One validated question: the metadata of every array and every scalar. Hashable; holds no data."""

    q: Array
    k: Array
    v: Array
    bias: Array | None
    mask: Array | None
    alibi_slopes: Array | None
    sink: Array | None
    cu_seqlens_q: Array | None
    cu_seqlens_k: Array | None
    seqused_q: Array | None
    seqused_k: Array | None
    leftpad_k: Array | None
    offset: Array | None
    block_table: Array | None
    cache_batch_idx: Array | None
    rng_state: Array | None
    out: Array | None  # these four: backward only
    lse: Array | None
    dout: Array | None
    dlse: Array | None
    batch: int
    seqlen_q: int  # packed: an upper bound of any sequence's length
    seqlen_k: int  # paged: logical slots of a sequence
    interval: Mask
    alignment: str
    scale: float
    softcap: float
    dropout_p: float
    deterministic: bool
    batch_invariant: bool

    @property
    def packed_q(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def packed_k(self) -> bool:
        return self.cu_seqlens_k is not None

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def dtype(self) -> str:
        return self.q.dtype

    @property
    def compute_dtype(self) -> str:
        """Scores, softmax, accumulators and lse."""
        return "float64" if self.q.dtype == "float64" else "float32"

    @property
    def device(self) -> str:
        return self.q.device

    @property
    def nheads(self) -> int:
        return self.q.shape[-2]

    @property
    def nheads_kv(self) -> int:
        return self.k.shape[-2]

    @property
    def group(self) -> int:
        return self.nheads // self.nheads_kv

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def page_size(self) -> int:
        return self.k.shape[1] if self.paged else 0

    @property
    def dropout_threshold(self) -> int:
        return philox.threshold(self.dropout_p)

    @property
    def has_tables(self) -> bool:
        return any(getattr(self, name) is not None for name in TABLES)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(batch, nheads, seqlen_q); packed (nheads, total_q)."""
        if self.packed_q:
            return (self.nheads, self.q.shape[0])
        return (self.q.shape[0], self.nheads, self.q.shape[1])

    @property
    def variant(self) -> Variant:
        features = {
            "left": self.interval.left is not None,
            "right": self.interval.right is not None,
            "chunk": self.interval.chunk > 0,
            "lengths": any(x is not None for x in (self.seqused_q, self.seqused_k, self.leftpad_k, self.offset)),
            "packed": self.packed_q or self.packed_k,
            "paged": self.paged,
            "cache_batch_idx": self.cache_batch_idx is not None,
            "mask": self.mask is not None,
            "bias": self.bias is not None,
            "softcap": self.softcap > 0,
            "alibi": self.alibi_slopes is not None,
            "sink": self.sink is not None,
            "dropout": self.dropout_threshold > 0,
            "backward": self.dout is not None,
        }
        names = tuple(name for name, on in features.items() if on)
        return Variant(self.dtype, self.head_dim, self.head_dim_v, self.group > 1, names)

    def __str__(self) -> str:
        what = f"{self.dtype} attention, q {self.q.shape}, k {self.k.shape}, v {self.v.shape} on {self.device}"
        return f"{what}, {' '.join(self.variant.features)}" if self.variant.features else what


def make_problem(arrays: Mapping[str, Array | None], options: Options) -> Problem:
    """Validates a call's metadata; ValueError (sizes, scalars) and TypeError (dtypes) name the argument."""
    given = {name: arrays.get(name) for name in (*INPUTS, *SAVED)}
    q, k, v = (_required(given, name) for name in ("q", "k", "v"))
    _check_types(options)
    batch, seqlen_q, seqlen_k = _sizes(given, q, k, v, options)
    _check_dtypes(given, q, k, v)
    _check_heads(q, k, v)
    _check_devices(given, q)
    _check_tables(given, batch)
    _check_scores(given, q, batch, seqlen_q, seqlen_k)
    _check_scalars(options, given, "float64" if q.dtype == "float64" else "float32")
    scale = 1.0 / math.sqrt(q.shape[-1]) if options.scale is None else float(options.scale)
    problem = Problem(
        **given,  # type: ignore[arg-type]
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        interval=_interval(options, given["offset"] is not None, seqlen_q, seqlen_k),
        alignment=options.alignment if given["offset"] is None else "offset",
        scale=scale,
        softcap=float(options.softcap),
        dropout_p=float(options.dropout_p),
        deterministic=options.deterministic,
        batch_invariant=options.batch_invariant,
    )
    _check_saved(problem)
    return problem


def _check_saved(problem: Problem) -> None:
    for name, want in (("dout", problem.out_shape), ("out", problem.out_shape), ("lse", problem.lse_shape)):
        array = getattr(problem, name)
        if problem.dout is not None and (array is None or array.shape != want):
            raise ValueError(f"{name} must have shape {want}; got {None if array is None else array.shape}")
    if problem.dlse is not None and problem.dlse.shape != problem.lse_shape:
        raise ValueError(f"dlse must have lse's shape {problem.lse_shape}; got {problem.dlse.shape}")


def _required(given: Mapping[str, Array | None], name: str) -> Array:
    array = given[name]
    if array is None:
        raise TypeError(f"{name} is None: q, k and v are required")
    return array


def _sizes(given: Mapping[str, Array | None], q: Array, k: Array, v: Array, options: Options) -> tuple[int, int, int]:
    """(batch, seqlen_q, seqlen_k); checks the ranks and that k and v agree."""
    cu_q, cu_k, pages = given["cu_seqlens_q"], given["cu_seqlens_k"], given["block_table"]
    if cu_k is not None and pages is not None:
        raise ValueError("cu_seqlens_k and block_table exclude each other: paged k takes its lengths from seqused_k")
    rank_q = ("(total_q, nheads, head_dim)", 3) if cu_q is not None else ("(batch, seqlen_q, nheads, head_dim)", 4)
    rank_k = ("(batch, seqlen_k, nheads_kv, head_dim)", 4)
    if pages is not None:
        rank_k = ("(num_pages, page_size, nheads_kv, head_dim)", 4)
    elif cu_k is not None:
        rank_k = ("(total_k, nheads_kv, head_dim)", 3)
    for name, array, (text, rank) in (("q", q, rank_q), ("k", k, rank_k), ("v", v, rank_k)):
        if len(array.shape) != rank:
            raise ValueError(f"{name} must have {rank} dimensions {text}; got {array.shape}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must agree in all but the last dimension; got k {k.shape}, v {v.shape}")
    batch = q.shape[0]
    for name, table in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if table is not None:
            if len(table.shape) != 1 or table.shape[0] < 1:
                raise ValueError(f"{name} must have shape (batch + 1,); got {table.shape}")
            batch = table.shape[0] - 1
    if pages is not None:
        if len(pages.shape) != 2:
            raise ValueError(f"block_table must have shape (batch, max_pages); got {pages.shape}")
        seqlen_k = pages.shape[1] * k.shape[1]
    else:
        seqlen_k = k.shape[0] if cu_k is not None else k.shape[1]
        if cu_k is None and given["cache_batch_idx"] is None and k.shape[0] != batch:
            raise ValueError(f"k must have q's batch {batch} as its first dimension; got k {k.shape}, q {q.shape}")
    seqlen_q = q.shape[0] if cu_q is not None else q.shape[1]
    seqlen_q = min(seqlen_q, options.max_seqlen_q) if cu_q is not None and options.max_seqlen_q else seqlen_q
    seqlen_k = min(seqlen_k, options.max_seqlen_k) if cu_k is not None and options.max_seqlen_k else seqlen_k
    return batch, seqlen_q, seqlen_k


def _check_dtypes(given: Mapping[str, Array | None], q: Array, k: Array, v: Array) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"q has dtype {q.dtype}; accepted are {', '.join(DTYPES)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}: convert them first")
    compute = "float64" if q.dtype == "float64" else "float32"
    accepted = {
        "bias": (q.dtype, compute),
        "mask": ("bool",),
        "alibi_slopes": (compute,),
        "sink": (compute,),
        "rng_state": ("int64",),
        **dict.fromkeys(("out", "dout"), (q.dtype, compute)),
        **dict.fromkeys(("lse", "dlse"), (compute,)),
        **dict.fromkeys(TABLES, ("int32",)),
    }
    for name, dtypes in accepted.items():
        array = given[name]
        if array is not None and array.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {array.dtype}; accepted here: {', '.join(dict.fromkeys(dtypes))}")


def _check_heads(q: Array, k: Array, v: Array) -> None:
    nheads, nheads_kv = q.shape[-2], k.shape[-2]
    if nheads < 1 or nheads_kv < 1 or nheads % nheads_kv:
        raise ValueError(
            f"nheads ({nheads}) must be a multiple of nheads_kv ({nheads_kv}); got q {q.shape}, k {k.shape}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have one head_dim; got q {q.shape}, k {k.shape}")
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        raise ValueError(f"head_dim and head_dim_v must be at least 1; got q {q.shape}, v {v.shape}")


def _check_devices(given: Mapping[str, Array | None], q: Array) -> None:
    for name, array in given.items():
        if array is not None and array.device != q.device:
            raise ValueError(f"{name} is on {array.device} but q is on {q.device}: all arrays must be on one device")


def _check_tables(given: Mapping[str, Array | None], batch: int) -> None:
    for name in ("seqused_q", "seqused_k", "leftpad_k", "offset", "cache_batch_idx"):
        array = given[name]
        if array is not None and array.shape != (batch,):
            raise ValueError(f"{name} must have shape (batch,) = ({batch},); got {array.shape}")
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        array = given[name]
        if array is not None and array.shape != (batch + 1,):
            raise ValueError(f"{name} must have shape (batch + 1,) = ({batch + 1},); got {array.shape}")
    pages = given["block_table"]
    if pages is not None and pages.shape[0] != batch:
        raise ValueError(f"block_table must have batch = {batch} rows; got {pages.shape}")
    if given["cache_batch_idx"] is not None and (pages is not None or given["cu_seqlens_k"] is not None):
        raise ValueError("cache_batch_idx needs a dense cache; it cannot be combined with block_table or cu_seqlens_k")
    if given["rng_state"] is not None and given["rng_state"].shape != (2,):
        raise ValueError(f"rng_state must have shape (2,): seed and offset; got {given['rng_state'].shape}")


def _check_scores(given: Mapping[str, Array | None], q: Array, batch: int, seqlen_q: int, seqlen_k: int) -> None:
    nheads = q.shape[-2]
    full = (batch, nheads, seqlen_q, seqlen_k)
    packed = given["cu_seqlens_q"] is not None or given["cu_seqlens_k"] is not None
    for name in ("bias", "mask"):
        array = given[name]
        if array is None:
            continue
        if packed:
            raise ValueError(f"{name} cannot be combined with cu_seqlens: a dense {name} has no packed layout")
        if len(array.shape) != 4 or any(size not in (1, want) for size, want in zip(array.shape, full, strict=True)):
            raise ValueError(
                f"{name} must broadcast to (batch, nheads, seqlen_q, seqlen_k) = {full}; got {array.shape}"
            )
    slopes, sink = given["alibi_slopes"], given["sink"]
    if slopes is not None and slopes.shape not in ((nheads,), (batch, nheads)):
        raise ValueError(f"alibi_slopes must have shape ({nheads},) or ({batch}, {nheads}); got {slopes.shape}")
    if sink is not None and sink.shape != (nheads,):
        raise ValueError(f"sink must have shape (nheads,) = ({nheads},); got {sink.shape}")


def _check_types(options: Options) -> None:
    for name in ("scale", "softcap", "dropout_p"):
        value = getattr(options, name)
        if not isinstance(value, numbers.Real) and not (name == "scale" and value is None):
            raise TypeError(f"{name} must be a real number; got {value!r}")
    for name in ("chunk", "max_seqlen_q", "max_seqlen_k"):
        value = getattr(options, name)
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer; got {value!r}")


def _check_scalars(options: Options, given: Mapping[str, Array | None], compute: str) -> None:
    limit = 2.0**128 if compute == "float32" else math.inf
    if options.scale is not None and not abs(options.scale) < limit:
        raise ValueError(f"scale must be finite, as a {compute}; got {options.scale}")
    if not 0 <= options.softcap < limit:
        raise ValueError(f"softcap must be finite, as a {compute}, and >= 0 (0: off); got {options.softcap}")
    if options.chunk < 0:
        raise ValueError(f"chunk must be >= 0 (0: off); got {options.chunk}")
    if options.alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}; got {options.alignment!r}")
    if not 0.0 <= options.dropout_p < 1.0 or philox.threshold(options.dropout_p) > 65535:
        raise ValueError(f"dropout_p must be in [0, 1 - 2^-17); got {options.dropout_p}")
    if philox.threshold(options.dropout_p) and given["rng_state"] is None:
        raise ValueError("dropout_p > 0 needs rng_state, an int64 array (seed, offset), or an int seed")
    for name, size in (("max_seqlen_q", options.max_seqlen_q), ("max_seqlen_k", options.max_seqlen_k)):
        if size < 0:
            raise ValueError(f"{name} must be >= 0 (0 or None: not known); got {size}")


def _interval(options: Options, given_offset: bool, seqlen_q: int, seqlen_k: int) -> Mask:
    """Bounds clamped so that positions never overflow, and dropped where they cannot exclude a key."""
    reach = POSITION_LIMIT if given_offset else seqlen_q + seqlen_k
    left, right = options.left, options.right
    left = None if left is None or left >= reach else max(left, -reach)
    right = None if right is None or right >= reach else max(right, -reach)
    return Mask(left, right, min(options.chunk, POSITION_LIMIT))
