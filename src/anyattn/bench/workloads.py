"""Workloads: one description each, with its useful work and memory traffic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ..definition.mask import Mask

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}
BIASES = ("", "full", "key")  # (1, nheads, seqlen_q, seqlen_k) or (1, 1, 1, seqlen_k)
# Keys beyond 3/4 of a sequence masked; four documents that attend only to themselves.
MASKS = ("", "padding", "documents")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Workload:
    """Timed call. A `testing.Case` samples lengths and contents; a Workload specifies all of them.

    Masks are aligned to the bottom right. Zeros mean: seqlen_k as seqlen_q, nheads_kv as nheads, head_dim_v as
    head_dim.

    lengths: packed sequences, with as many keys as queries, instead of batch and seqlen_q. cache: k and v are a KV
    cache, in pages of `page_size` unless it is 0. stored: dtype of a quantised cache, with a scale per slot and head.
    backward: gradients of q, k and v after a saved forward pass.
    """

    name: str
    batch: int
    nheads: int
    seqlen_q: int
    head_dim: int
    seqlen_k: int = 0
    nheads_kv: int = 0
    head_dim_v: int = 0
    dtype: str = "float32"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi: bool = False
    sink: bool = False
    dropout_p: float = 0.0
    bias: str = ""
    mask: str = ""
    lengths: tuple[int, ...] = ()
    cache: bool = False
    page_size: int = 0
    stored: str = ""
    backward: bool = False
    suite: str = ""

    def __post_init__(self) -> None:
        defaults = {"seqlen_k": self.seqlen_q, "nheads_kv": self.nheads, "head_dim_v": self.head_dim}
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if self.lengths:
            object.__setattr__(self, "batch", len(self.lengths))
            object.__setattr__(self, "seqlen_q", max(self.lengths))
            object.__setattr__(self, "seqlen_k", max(self.lengths))
        if self.window is not None:
            object.__setattr__(self, "window", tuple(self.window))

    @property
    def packed(self) -> bool:
        return bool(self.lengths)

    @property
    def group(self) -> int:
        return self.nheads // self.nheads_kv

    @property
    def interval(self) -> Mask:
        left, right = self.window or (None, None)
        return Mask(left, 0 if self.causal else right)

    def sequences(self) -> Iterator[tuple[int, int]]:
        """Yield (queries, keys) of every sequence."""
        yield from (
            zip(self.lengths, self.lengths, strict=True)
            if self.lengths
            else [(self.seqlen_q, self.seqlen_k)] * self.batch
        )

    def bounds(self, n_q: int, n_k: int) -> tuple[Ints, Ints]:
        """Return the first and one-past-last key of each query."""
        lo, hi = self.interval.bounds(np.arange(n_q) + n_k - n_q, n_k)
        return lo, np.maximum(lo, hi)

    def masked(self, n_q: int, n_k: int) -> npt.NDArray[np.bool_] | None:
        """Return what the boolean mask masks, (n_q, n_k) or (1, n_k), or None without a mask."""
        keys = np.arange(n_k)
        if self.mask == "padding":
            return np.asarray(keys[None] >= n_k - n_k // 4)
        if self.mask == "documents":
            size = -(-n_k // 4)
            return np.asarray((np.arange(n_q)[:, None] + n_k - n_q) // size != keys // size)
        return None

    @property
    def pairs(self) -> float:
        """Return the unmasked (query, key) pairs of one head, over the batch."""
        total = 0.0
        for n_q, n_k in self.sequences():
            lo, hi = self.bounds(n_q, n_k)
            masked = self.masked(n_q, n_k)
            if masked is None:
                total += float((hi - lo).sum())
            else:
                seen = np.concatenate([np.zeros((len(masked), 1), np.int64), np.cumsum(~masked, axis=1)], axis=1)
                row = np.arange(n_q) if len(masked) > 1 else np.zeros(n_q, np.int64)
                total += float((seen[row, hi] - seen[row, lo]).sum())
        return total

    @property
    def flops(self) -> float:
        """Return the floating-point operations of unmasked pairs: 2 (D + Dv) per pair forward, 6 D + 4 Dv backward."""
        d, dv = self.head_dim, self.head_dim_v
        return self.pairs * self.nheads * (6 * d + 4 * dv if self.backward else 2 * (d + dv))

    @property
    def kv_bytes(self) -> float:
        """Return the bytes of K and V that some query attends to; decoding has to read them once."""
        keys = 0
        for n_q, n_k in self.sequences():
            lo, hi = self.bounds(n_q, n_k)
            keys += int(hi.max(initial=0) - lo.min(initial=0))
        scales = 8 if self.stored else 0
        key = (self.head_dim + self.head_dim_v) * ITEMSIZE[self.stored or self.dtype] + scales
        return float(keys * self.nheads_kv * key)

    @property
    def bytes(self) -> float:
        """Return the bytes of all inputs and results, each counted once: the minimum traffic of any implementation."""
        rows = sum(n_q for n_q, _ in self.sequences()) * self.nheads
        q, out = rows * self.head_dim * ITEMSIZE[self.dtype], rows * self.head_dim_v * ITEMSIZE[self.dtype]
        scores = self.score_bytes
        if self.backward:  # q, dq; out, dout; k, v and their gradients; lse
            return 2.0 * (q + out + self.kv_bytes) + 4 * rows + scores
        return q + out + self.kv_bytes + scores

    @property
    def score_bytes(self) -> float:
        """Return the bytes of the bias and the boolean mask."""
        per_head = self.seqlen_q * self.seqlen_k
        bias = {"": 0, "full": self.nheads * per_head, "key": self.seqlen_k}[self.bias] * ITEMSIZE[self.dtype]
        mask = {"": 0, "padding": self.seqlen_k, "documents": per_head}[self.mask]
        return float(bias + mask)

    @property
    def matrix_bytes(self) -> float:
        """Return the bytes of one matrix of float32 scores, which the plain formula stores more than once."""
        return (
            4.0
            * self.nheads
            * max((n_q * n_k for n_q, n_k in self.sequences()), default=0)
            * (1 if self.lengths else self.batch)
        )

    @property
    def reads_memory(self) -> bool:
        """Return whether reading K and V dominates, because there are few queries and many keys."""
        return self.seqlen_q < 64 <= self.seqlen_k // 16 and not self.packed

    @property
    def label(self) -> str:
        heads = f"{self.nheads}" + (f":{self.nheads_kv}" if self.group > 1 else "")
        lengths = f"{self.seqlen_q}" + (f"x{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else "")
        dims = f"{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        left = None if self.window is None else self.window[0]
        flags = {
            "packed": self.packed,
            "causal": self.causal,
            f"window {left}": self.window is not None,
            f"softcap {self.softcap:g}": self.softcap,
            "alibi": self.alibi,
            "sink": self.sink,
            f"dropout {self.dropout_p:g}": self.dropout_p,
            f"bias {self.bias}": self.bias,
            f"mask {self.mask}": self.mask,
            "cache": self.cache and not self.page_size,
            f"pages of {self.page_size}": self.page_size,
            self.stored: self.stored,
        }
        words = [f"({self.batch}, {heads}, {lengths}, {dims})", self.dtype, *(text for text, on in flags.items() if on)]
        return " ".join([*words, "backward" if self.backward else "forward"])


def from_json(row: dict[str, Any]) -> Workload:
    """Return the workload of a row of results. Other contents of the row are ignored."""
    names = {field.name for field in fields(Workload)}
    return Workload(**{name: value for name, value in row.items() if name in names})
