"""From the arguments that users give to what frameworks take: interval bounds, Options, ordered arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .problem import Options

Array = Any  # numpy.ndarray or torch.Tensor
Window = Sequence["int | None"] | None
Canonical = tuple[tuple[Array | None, ...], Options, int | None, str | None]


def bounds(causal: bool, window: Window) -> tuple[int | None, int | None]:
    """(left, right) of the interval that causal and window ask for together."""
    if causal is None or isinstance(causal, (str, float, tuple, list, dict)):  # "False" would be true
        raise TypeError(f"causal must be True or False; got {causal!r}")
    if window is None:
        return None, 0 if causal else None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) or None; got {window!r}")
    for side in window:
        if side is not None and (not _is_length(side) or side < 0):
            raise ValueError(f"window must hold integers >= 0 or None (unbounded); got {window!r}")
    left, right = window
    return left, 0 if causal else right


def _is_length(side: Any) -> bool:
    """An integer whose value is its key among cached plans (a tensor's is not), or one of torch's in a trace."""
    return isinstance(side, (int, np.integer)) or type(side).__name__ == "SymInt"


def check_parts(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> None:
    """Raises where they are no results over two sets of keys: nothing is broadcast."""
    parts = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in parts.items():
        if not hasattr(x, "shape"):
            raise TypeError(f"{name} must be an array or a tensor; got {type(x).__name__}")
    shape = tuple(out_a.shape)
    want = (*shape[:-3], *shape[-3:-1][::-1])  # (..., seqlen, nheads) of out as (..., nheads, seqlen)
    if len(shape) < 3 or out_b.shape != shape or lse_a.shape != want or lse_b.shape != want:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in parts.items())
        raise ValueError(
            f"merge takes two out (..., seqlen, nheads, head_dim_v), two lse (..., nheads, seqlen); got {shapes}"
        )


def paged_lengths(
    block_table: Array | None, cu_seqlens_k: Array | None, seqused_k: Array | None
) -> tuple[Array, Array]:
    """(cu_seqlens_k, seqused_k): with pages, cumulative lengths say nothing about places; only lengths are kept."""
    if block_table is None or cu_seqlens_k is None:
        return cu_seqlens_k, seqused_k
    if seqused_k is None:
        cu_seqlens_k = np.asarray(cu_seqlens_k) if isinstance(cu_seqlens_k, (list, tuple)) else cu_seqlens_k
        seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    return None, seqused_k


def explicit(
    q: Array,
    k: Array,
    v: Array,
    *,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Array | None = None,
    cache_batch_idx: Array | None = None,
    causal: bool = False,
    window: Window = None,
    chunk: int = 0,
    alignment: str = "bottom-right",
    offset: int | Array | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Array | None = None,
    mask: Array | None = None,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    leftpad_k: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    rng_state: Array | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Canonical:
    """The arguments of the explicit functions in canonical form: (arrays, options, seed, backend)."""
    left, right = bounds(causal, window)
    cu_seqlens_k, seqused_k = paged_lengths(block_table, cu_seqlens_k, seqused_k)
    options = Options(
        scale,
        softcap,
        left,
        right,
        chunk,
        alignment,
        dropout_p,
        0 if max_seqlen_q is None else max_seqlen_q,
        0 if max_seqlen_k is None else max_seqlen_k,
        deterministic,
        batch_invariant,
    )
    tables = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, offset, block_table, cache_batch_idx)
    return (q, k, v, bias, mask, alibi_slopes, sink, *tables, rng_state), options, seed, backend
