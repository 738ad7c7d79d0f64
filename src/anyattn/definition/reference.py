"""The definition of attention in NumPy float64, forward and backward, one head at a time, as the formulas are written.

    t = scale <q_i, k_j>;  t = softcap tanh(t / softcap);  s = t + bias - slope |p - c|
    lse_i = log(sum over seen j of exp(s_ij) + exp(sink_h));  P = exp(s - lse);  o_i = sum_j P_ij D_ij v_j

O(N^2) memory and slow on purpose: every backend is tested against it, and nothing ever chooses it.
Source: Dao et al., "FlashAttention-2" (2023), sections 2 and 3; options as in flash_attn, torch SDPA, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import philox
from .dtypes import LOWEST_SCORE, narrow, raw, widen
from .inputs import TABLES
from .problem import Problem
from .sequences import Sequence, sequences

Float = npt.NDArray[np.float64]
Arrays = Mapping[str, Any]


@dataclass
class Gradients:
    """float64, in the shapes of the inputs."""

    dq: Float
    dk: Float
    dv: Float
    dbias: Float | None
    dsink: Float | None


@dataclass
class Head:
    """Everything about one query head of one sequence: inputs as float64 rows, and what they give."""

    sequence: Sequence
    h: int
    rows_q: tuple[Any, ...]  # index of the head's rows in q, out, dout, dq
    rows_k: tuple[Any, ...]  # index of the keys' rows in k, v, dk, dv
    q: Float  # (n_q, head_dim)
    k: Float  # (n_k, head_dim)
    v: Float
    t: Float  # (n_q, n_k), after softcap
    s: Float  # scores; -inf where not seen
    p: Float  # probabilities
    d: Float  # dropout factors D
    lse: Float
    out: Float


def forward(problem: Problem, arrays: Arrays) -> tuple[Float, Float]:
    """(out, lse) in float64. Rows outside every sequence: out 0, lse -inf."""
    out = np.zeros(problem.out_shape)
    lse = np.full(problem.lse_shape, -np.inf)
    for head in heads(problem, arrays):
        out[head.rows_q] = head.out
        lse[rows_lse(problem, head)] = head.lse
    return out, lse


def backward(problem: Problem, arrays: Arrays, dout: Float, dlse: Float | None = None) -> Gradients:
    """Gradients of sum(out * dout) + sum(lse * dlse)."""
    grads = Gradients(
        dq=np.zeros(problem.q.shape),
        dk=np.zeros(problem.k.shape),
        dv=np.zeros(problem.v.shape),
        dbias=None if problem.bias is None else np.zeros(problem.bias.shape),
        dsink=None if problem.sink is None else np.zeros(problem.sink.shape),
    )
    for head in heads(problem, arrays):
        do = dout[head.rows_q]
        dl = np.zeros_like(head.lse) if dlse is None else dlse[rows_lse(problem, head)]
        dp = head.d * (do @ head.v.T)
        delta = (do * head.out).sum(-1) - dl
        ds = head.p * (dp - delta[:, None])
        dt = ds * (1 - (head.t / problem.softcap) ** 2) if problem.softcap > 0 else ds
        grads.dq[head.rows_q] = problem.scale * dt @ head.k
        np.add.at(grads.dk, head.rows_k, problem.scale * dt.T @ head.q)
        np.add.at(grads.dv, head.rows_k, (head.p * head.d).T @ do)
        if grads.dbias is not None:
            add_dbias(grads.dbias, head, ds)
        if grads.dsink is not None:
            sink = float(np.asarray(arrays["sink"])[head.h])
            # 1 where the row sees no key
            weight = np.exp(np.minimum(sink - head.lse, 0.0)) if np.isfinite(sink) else 0.0
            grads.dsink[head.h] -= (weight * delta).sum()
    return grads


def heads(problem: Problem, arrays: Arrays) -> Iterator[Head]:
    """Every query head of every sequence, computed."""
    tables = {name: arrays.get(name) for name in TABLES}
    q, k, v = (widen(np.asarray(arrays[name]), problem.dtype) for name in ("q", "k", "v"))
    for sequence in sequences(problem, tables):
        for h in range(problem.nheads):
            rows_q = _rows_q(problem, sequence, h)
            rows_k = _rows_k(problem, sequence, h // problem.group, tables["block_table"])
            yield _head(problem, arrays, sequence, h, (rows_q, rows_k), (q[rows_q], k[rows_k], v[rows_k]))


def _head(
    problem: Problem, arrays: Arrays, sequence: Sequence, h: int, rows: tuple[Any, Any], qkv: tuple[Float, Float, Float]
) -> Head:
    q, k, v = qkv
    keys = np.arange(sequence.n_k)
    lo, hi = problem.interval.bounds(sequence.positions(), sequence.n_k, sequence.leftpad)
    seen = np.asarray((lo[:, None] <= keys) & (keys < hi[:, None]))
    used = np.asarray(seen.any(axis=0))  # memory that no row may see is never read into a result
    k, v = np.where(used[:, None], k, 0.0), np.where(used[:, None], v, 0.0)
    t = problem.scale * (q @ k.T)
    if problem.softcap > 0:
        t = problem.softcap * np.tanh(t / problem.softcap)
    s = t + _score_terms(problem, arrays, sequence, h)
    if problem.mask is not None:
        seen &= _tile(np.asarray(arrays["mask"]), sequence, h) != 0
    s = np.where(seen & ~(s < LOWEST_SCORE[problem.compute_dtype]), s, -np.inf)  # NaN stays
    sink = -np.inf if problem.sink is None else float(np.asarray(arrays["sink"])[h])
    lse = _logsumexp(s, sink)
    p = np.exp(s - np.where(np.isfinite(lse), lse, 0.0)[:, None])
    d = np.ones_like(p)
    if problem.dropout_threshold:
        state = np.asarray(arrays["rng_state"])
        kept = philox.keep(
            state, problem.dropout_p, sequence.number * problem.nheads + h, np.arange(sequence.n_q), keys
        )
        d = kept * philox.keep_scale(problem.dropout_p)
    return Head(sequence, h, *rows, q, k, v, t, s, p, d, lse, (p * d) @ v)


def _score_terms(problem: Problem, arrays: Arrays, sequence: Sequence, h: int) -> Float | float:
    """bias_ij - slope |p - c|"""
    terms: Float | float = 0.0
    if problem.bias is not None:
        terms = terms + _tile(widen(np.asarray(arrays["bias"]), problem.bias.dtype), sequence, h)
    if problem.alibi_slopes is not None:
        slopes = np.asarray(arrays["alibi_slopes"], np.float64)
        slope = slopes[h] if slopes.ndim == 1 else slopes[sequence.number, h]
        c = np.arange(sequence.n_k) - sequence.leftpad
        terms = terms - slope * np.abs(sequence.positions()[:, None] - c)
    return terms


def _logsumexp(s: Float, sink: float) -> Float:
    """Natural-log row sums of exp(s) + exp(sink); -inf for empty rows."""
    top = np.maximum(s.max(axis=1, initial=-np.inf), sink)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(safe + np.log(np.exp(s - safe[:, None]).sum(axis=1) + np.exp(sink - safe)))


def _tile(array: npt.NDArray[Any], sequence: Sequence, h: int) -> npt.NDArray[Any]:
    """(n_q, n_k) or broadcastable part of a (batch, nheads, seqlen_q, seqlen_k) array."""
    batch, nheads = array.shape[:2]
    tile = array[sequence.number if batch > 1 else 0, h if nheads > 1 else 0]
    return np.asarray(tile[: sequence.n_q if tile.shape[0] > 1 else 1, : sequence.n_k if tile.shape[1] > 1 else 1])


def add_dbias(dbias: Float, head: Head, ds: Float) -> None:
    tile = _tile(dbias, head.sequence, head.h)
    axes = tuple(axis for axis in (0, 1) if tile.shape[axis] == 1)
    tile += ds.sum(axis=axes, keepdims=True) if axes else ds


def _rows_q(problem: Problem, sequence: Sequence, h: int) -> tuple[Any, ...]:
    if problem.packed_q:
        return (slice(sequence.row_q, sequence.row_q + sequence.n_q), h)
    return (sequence.number, slice(0, sequence.n_q), h)


def rows_lse(problem: Problem, head: Head) -> tuple[Any, ...]:
    s = head.sequence
    if problem.packed_q:
        return (head.h, slice(s.row_q, s.row_q + s.n_q))
    return (s.number, head.h, slice(0, s.n_q))


def _rows_k(problem: Problem, sequence: Sequence, h_kv: int, block_table: Any) -> tuple[Any, ...]:
    slots = np.arange(sequence.n_k)
    if problem.paged:
        return (block_table[sequence.number][slots // problem.page_size], slots % problem.page_size, h_kv)
    if problem.packed_k:
        return (sequence.row_k + slots, h_kv)
    return (sequence.batch_k, slots, h_kv)


def append(problem: Problem, arrays: Arrays) -> Float | None:
    """Writes new_k (rotated) and new_v into k and v, in place; returns q rotated (float64), or None without rotary."""
    dtype = problem.q.dtype
    k, v, new_k, new_v = (raw(arrays[name], dtype) for name in ("k", "v", "new_k", "new_v"))
    lengths = np.asarray(arrays["cache_seqlens"]).astype(np.int64)
    rows = np.arange(problem.q.shape[1]) if problem.rotation.by_row else np.zeros(problem.q.shape[1], np.int64)
    q = np.zeros(problem.q.shape) if problem.rotary_dim else None
    for b in range(problem.batch):
        slots = lengths[b] + np.arange(problem.seqlen_new)
        if problem.block_table is not None:
            where: tuple[Any, ...] = (arrays["block_table"][b][slots // problem.page_size], slots % problem.page_size)
        else:
            where = (b if problem.cache_batch_idx is None else arrays["cache_batch_idx"][b], slots)
        v[where] = new_v[b]
        if q is None:
            k[where] = new_k[b]
        else:
            k[where] = narrow(rotate(problem, arrays, widen(new_k[b], dtype), slots), dtype)
            q[b] = rotate(problem, arrays, widen(arrays["q"][b], dtype), lengths[b] + rows)
    return q


def rotate(problem: Problem, arrays: Arrays, x: Float, positions: npt.NDArray[np.int64]) -> Float:
    """Rotates the first rotary_dim values of x (rows, nheads, head_dim) by the angles of `positions`."""
    half = problem.rotary_dim // 2
    assert problem.rotary_cos is not None and problem.rotary_sin is not None
    cos = widen(arrays["rotary_cos"][positions], problem.rotary_cos.dtype)[:, None, :]
    sin = widen(arrays["rotary_sin"][positions], problem.rotary_sin.dtype)[:, None, :]
    first = slice(0, 2 * half, 2) if problem.rotation.interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if problem.rotation.interleaved else slice(half, 2 * half)
    out: Float = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out
