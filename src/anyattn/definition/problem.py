"""Problems: calls without their data, as metadata of arrays. Backends decide on a Problem whether they support it.

`validate.py` holds the rules of a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from . import philox
from .dtypes import DTYPES, QUANTISED
from .inputs import TABLES
from .mask import Mask
from .options import Rotation
from .passes import APPEND, ARRAYS, Pass
from .score.graph import Graph, parse


class Array(NamedTuple):
    """Metadata of one array: shape, strides in elements, name of the dtype, name of the device."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    def strides4(self) -> tuple[int, int, int, int]:
        """Return the strides as (batch, row, head, dim): packed arrays have no batch axis."""
        first, *rest = (0, *self.strides) if len(self.strides) == 3 else self.strides
        return (first, rest[0], rest[1], rest[2])


def contiguous(shape: Sequence[int], dtype: str, device: str = "cpu") -> Array:
    """Return the metadata of a new array."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Array(tuple(shape), tuple(reversed(strides)), dtype, device)


class Variant(NamedTuple):
    """Key of compiled code, without sizes, strides and scalars."""

    pass_: str
    dtype: str  # of q
    dtype_kv: str
    head_dim: int
    head_dim_v: int
    grouped: bool
    features: tuple[str, ...]
    score: str = ""  # text of the score function and the mask function


class Problem(NamedTuple):
    """Validated call of one pass: the metadata of every array, and every scalar. It holds no data.

    Arrays are attributes under their names in `passes.py`. An array that was not passed is None.
    """

    pass_: Pass
    arrays: Mapping[str, Array]
    batch: int
    seqlen_q: int  # packed: an upper bound on the length of a sequence
    seqlen_k: int  # paged or append: logical slots of a sequence
    interval: Mask = Mask()
    alignment: str = "bottom-right"
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    batch_invariant: bool = False
    query_start: int = 0  # added to the indices that dropout counts by
    key_start: int = 0
    partial: bool = False  # out and gradients in the compute dtype
    rotation: Rotation = Rotation()  # used by the APPEND pass
    score: str = ""  # text of score_mod and mask_mod
    precision: str = ""  # "exact", "fast", or "" for the setting's; it permits errors and never requires them

    def __getattr__(self, name: str) -> Array | None:
        if name in ARRAYS:
            return self.arrays.get(name)
        raise AttributeError(f"Problem has no attribute {name!r}")

    def with_arrays(self, **arrays: Array) -> Problem:
        """Return the problem with some arrays replaced. Nothing is checked again."""
        return self._replace(arrays={**self.arrays, **arrays})

    @property
    def q(self) -> Array:
        return self.arrays["q"]

    @property
    def k(self) -> Array:
        return self.arrays["k"]

    @property
    def v(self) -> Array:
        return self.arrays["v"]

    @property
    def packed_q(self) -> bool:
        return "cu_seqlens_q" in self.arrays

    @property
    def packed_k(self) -> bool:
        return "cu_seqlens_k" in self.arrays

    @property
    def paged(self) -> bool:
        return "block_table" in self.arrays

    @property
    def dtype(self) -> str:
        return self.q.dtype

    @property
    def compute_dtype(self) -> str:
        """Return the dtype of scores, softmax, accumulators and lse."""
        return DTYPES[self.q.dtype].compute

    @property
    def result_dtype(self) -> str:
        """Return the dtype of out, and of dq, dk and dv."""
        return self.compute_dtype if self.partial else self.dtype

    @property
    def device(self) -> str:
        return self.q.device

    @property
    def quantised(self) -> bool:
        """Return whether k and v are stored with scales."""
        return self.k.dtype in QUANTISED

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
    def seqlen_new(self) -> int:
        """Return the number of keys that an append writes for each sequence."""
        new_k = self.new_k
        return 0 if new_k is None else new_k.shape[1]

    @property
    def rotary_dim(self) -> int:
        cos = self.rotary_cos
        return 0 if cos is None else 2 * cos.shape[1]

    @property
    def dropout_threshold(self) -> int:
        return philox.threshold(self.dropout_p)

    @property
    def functions(self) -> Graph:
        """Return the graph of score_mod and mask_mod, which is empty without them."""
        return parse(self.score) if self.score else Graph()

    @property
    def has_tables(self) -> bool:
        """Return whether a call has values that are checked before it is computed."""
        if self.score or self.quantised:
            return True
        return "cache_seqlens" in self.arrays or any(name in self.arrays for name in TABLES)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Return (batch, nheads, seqlen_q); packed: (nheads, total_q)."""
        if self.packed_q:
            return (self.nheads, self.q.shape[0])
        return (self.q.shape[0], self.nheads, self.q.shape[1])

    def outputs(self) -> dict[str, Array]:
        """Return the metadata of the new contiguous arrays that the pass writes."""
        found = {name: self._output(name) for name in self.pass_.outputs}
        return {name: array for name, array in found.items() if array is not None}

    def _output(self, name: str) -> Array | None:
        if self.pass_ is APPEND:  # rotated q
            return contiguous(self.q.shape, self.dtype, self.device) if self.rotary_dim else None
        if name in ("out", "tout", "ddout"):
            return contiguous(self.out_shape, self.result_dtype, self.device)
        if name in ("lse", "tlse", "ddlse"):
            return contiguous(self.lse_shape, self.compute_dtype, self.device)
        array = self.arrays.get(name.removeprefix("d"))  # the output is a gradient
        if array is None or array.dtype in QUANTISED:  # quantised keys and values have no gradients
            return None
        return contiguous(array.shape, self.compute_dtype if self.partial else array.dtype, self.device)

    @property
    def variant(self) -> Variant:
        features = {
            "left": self.interval.left is not None,
            "right": self.interval.right is not None,
            "chunk": self.interval.chunk > 0,
            "lengths": self._has("seqused_q", "seqused_k", "leftpad_k", "offset"),
            "packed": self.packed_q or self.packed_k,
            "paged": self.paged,
            "cache_batch_idx": self._has("cache_batch_idx"),
            "kv_indices": self._has("kv_indices"),
            "mask": self._has("mask"),
            "bias": self._has("bias"),
            "softcap": self.softcap > 0,
            "alibi": self._has("alibi_slopes"),
            "sink": self._has("sink"),
            "score_mod": self.functions.score is not None,
            "mask_mod": self.functions.mask is not None,
            "dropout": self.dropout_threshold > 0,
            "rotary": self.rotary_dim > 0,
            "quantised": self.quantised,
            "partial": self.result_dtype != self.dtype,
        }
        names = tuple(name for name, on in features.items() if on)
        return Variant(
            *(self.pass_.name, self.dtype, self.k.dtype, self.head_dim, self.head_dim_v, self.group > 1, names),
            score=self.score,
        )

    def _has(self, *names: str) -> bool:
        return any(name in self.arrays for name in names)

    def __str__(self) -> str:
        if self.pass_ is APPEND:
            return f"an append to a {self.k.shape} cache on {self.device}"
        what = f"{self.dtype} attention, q {self.q.shape}, k {self.k.shape}, v {self.v.shape} on {self.device}"
        features = [*self.variant.features, *([] if self.pass_.name == "forward" else [self.pass_.name])]
        return f"{what}, {' '.join(features)}" if features else what


T = TypeVar("T")


def described(names: Iterable[str], arrays: Iterable[Any], describe: Callable[[Any], T]) -> dict[str, T]:
    """Return `describe(array)` by name for each array that is not None. There may be fewer arrays than names."""
    return {name: describe(x) for name, x in zip(names, arrays, strict=False) if x is not None}
