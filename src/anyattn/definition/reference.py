"""Reference implementation in NumPy float64, forward and backward, one head at a time, written like the formulas.

    t = scale <q_i, k_j>;  t = softcap tanh(t / softcap);  s = score_mod(t, b, h, i, j) + bias - slope |p - c|
    lse_i = log(sum over visible j of exp(s_ij) + exp(sink_h));  P = exp(s - lse);  o_i = sum_j P_ij D_ij v_j

It needs O(N^2) memory and is slow, because clarity matters most here. Every backend is tested against it, and no call
uses it. Source: Dao et al., "FlashAttention-2" (2023), sections 2 and 3; options as in flash_attn, torch SDPA, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import philox
from .dtypes import LOWEST_SCORE, narrow, raw, widen
from .inputs import GRADIENTS, TABLES
from .problem import Problem
from .quantised import SCALES_OF, quantise, scales, slot_index
from .score.evaluate import Functions, Place
from .sequences import Sequence, is_listed, selected_keys, sequences

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Arrays = Mapping[str, Any]


@dataclass
class Gradients:
    """Gradients in float64, in the shapes of the inputs."""

    dq: Float
    dk: Float | None  # None for quantised keys and values
    dv: Float | None
    dbias: Float | None
    dsink: Float | None
    dcaptured: Float | None = None


class Part(NamedTuple):
    """Queries of one head of one sequence. Problems that are too large for the reference are checked in parts."""

    sequence: int  # index in the batch
    h: int
    rows: Ints


@dataclass
class Head:
    """Values of one query head of one sequence: the inputs in float64, and all intermediate results."""

    sequence: Sequence
    h: int
    rows: Ints  # queries of the sequence: all, or those in a Part
    rows_q: tuple[Any, ...]  # index of the head's queries in q, out, dout, dq
    rows_k: tuple[Any, ...]  # index of the head's keys in k, v, dk, dv
    q: Float  # (n_q, head_dim)
    k: Float  # (n_k, head_dim); keys that are not used are 0, here and in v
    v: Float
    used: npt.NDArray[np.bool_]  # (n_k,), keys that some query may attend to
    t: Float  # (n_q, n_k), after softcap
    s: Float  # scores; -inf for masked keys
    p: Float  # probabilities
    p_sink: Float  # (n_q,), probability of the sink; 1 for a query without visible keys
    d: Float  # dropout factors D
    lse: Float
    out: Float
    functions: Functions
    place: Place  # indices of the pairs, for the functions


def forward(problem: Problem, arrays: Arrays) -> tuple[Float, Float]:
    """Return (out, lse) in float64. Queries outside every sequence have out 0 and lse -inf."""
    out = np.zeros(problem.out_shape)
    lse = np.full(problem.lse_shape, -np.inf)
    for head in heads(problem, arrays):
        out[head.rows_q] = head.out
        lse[rows_lse(problem, head)] = head.lse
    return out, lse


def weights(problem: Problem, arrays: Arrays) -> Float:
    """Return P in float64, before dropout: (batch, nheads, seqlen_q, seqlen_k), 0 for masked keys.

    Packed queries are not supported, because they have no array of this shape.
    """
    p = np.zeros((problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k))
    for head in heads(problem, arrays):
        p[head.sequence.number, head.h, head.rows, : head.sequence.n_k] = head.p
    return p


def backward(problem: Problem, arrays: Arrays, dout: Float, dlse: Float | None = None) -> Gradients:
    """Return the gradients of sum(out * dout) + sum(lse * dlse)."""
    grads = {name: np.zeros(shape) for name, shape in gradient_shapes(problem).items()}
    for head in heads(problem, arrays):
        dl = np.zeros_like(head.lse) if dlse is None else dlse[rows_lse(problem, head)]
        add_gradients(grads, head, head_gradients(problem, head, dout[head.rows_q], dl))
    return Gradients(grads["dq"], grads.get("dk"), grads.get("dv"), *[grads.get(f"d{name}") for name in GRADIENTS])


def gradient_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Return the shape of every gradient that the problem has."""
    names = ("q", *(() if problem.quantised else ("k", "v")), *GRADIENTS)
    return {f"d{x}": problem.arrays[x].shape for x in names if x in problem.arrays}


def head_gradients(problem: Problem, head: Head, do: Float, dl: Float) -> dict[str, Any]:
    """Compute the terms that one head adds to every gradient. do, dl: the head's queries in dout and dlse."""
    dp = head.d * (do @ head.v.T)
    delta = (do * head.out).sum(-1) - dl
    ds = head.p * (dp - delta[:, None])
    captured = None if problem.captured is None else np.zeros(problem.captured.shape)
    dt = head.functions.backward(head.t, head.place, ds, captured)
    dt = dt * (1 - (head.t / problem.softcap) ** 2) if problem.softcap > 0 else dt
    return {
        "dq": problem.scale * dt @ head.k,
        "dk": problem.scale * dt.T @ head.q,
        "dv": (head.p * head.d).T @ do,
        "dbias": ds,
        "dsink": -(head.p_sink * delta).sum(),
        "dcaptured": captured,
    }


def add_gradients(sums: Mapping[str, npt.NDArray[Any]], head: Head, terms: Mapping[str, Any]) -> None:
    """Add one head's terms to the gradients in `sums`."""
    places: dict[str, Any] = {
        "dq": head.rows_q,
        "dk": head.rows_k,
        "dv": head.rows_k,
        "dsink": head.h,
        "dcaptured": ...,
    }
    for name, total in sums.items():
        if name == "dbias":
            _add_dbias(total, head, terms[name])
        elif name in ("dk", "dv"):
            np.add.at(total, places[name], terms[name])  # a sequence may use a page twice
        else:
            total[places[name]] += terms[name]


def heads(problem: Problem, arrays: Arrays, parts: Iterable[Part] | None = None) -> Iterator[Head]:
    """Compute every query head of every sequence, or only these parts."""
    found = list(sequences(problem, {name: arrays.get(name) for name in TABLES}))
    if parts is None:
        parts = (Part(s.number, h, np.arange(s.n_q)) for s in found for h in range(problem.nheads))
    for part in parts:
        yield _head(problem, arrays, found[part.sequence], part.h, part.rows)


def _head(problem: Problem, arrays: Arrays, sequence: Sequence, h: int, rows: Ints) -> Head:
    rows_q = _rows_q(problem, sequence, h, rows)
    slots = slot_index(problem, sequence, np.arange(sequence.n_k), arrays.get("block_table"))
    rows_k = (*slots, h // problem.group)
    places = (("q", rows_q), ("k", rows_k), ("v", rows_k))
    q, k, v = (widen(np.asarray(arrays[name])[place], problem.arrays[name].dtype) for name, place in places)
    if problem.quantised:
        k, v = (_scaled(problem, arrays, sequence, rows_k, name, x) for name, x in (("k", k), ("v", v)))
    keys = np.arange(sequence.n_k)
    lo, hi = problem.interval.bounds(sequence.positions()[rows], sequence.n_k, sequence.leftpad)
    seen = np.asarray((lo[:, None] <= keys) & (keys < hi[:, None]))
    if problem.kv_indices is not None:
        lists = selected_keys(problem, sequence, np.asarray(arrays["kv_indices"]))
        seen &= is_listed(lists[h // problem.group if len(lists) > 1 else 0, rows], sequence.n_k)
    used = np.asarray(seen.any(axis=0))  # memory of keys that no query attends to never affects a result
    k, v = np.where(used[:, None], k, 0.0), np.where(used[:, None], v, 0.0)
    t = problem.scale * (q @ k.T)
    if problem.softcap > 0:
        t = problem.softcap * np.tanh(t / problem.softcap)
    functions = Functions(problem.functions, arrays.get("captured"), arrays.get("captured_indices"), "float64")
    place = Place(sequence.number, h, rows[:, None], keys)
    s = functions.score(t, place) + _score_terms(problem, arrays, sequence, h, rows)
    if problem.mask is not None:
        seen &= score_tile(np.asarray(arrays["mask"]), sequence, h, rows) != 0
    if functions.graph.mask is not None:
        seen &= functions.mask(place)
    s = np.where(seen & ~(s < LOWEST_SCORE[problem.compute_dtype]), s, -np.inf)  # NaN stays
    sink = -np.inf if problem.sink is None else float(np.asarray(arrays["sink"])[h])
    lse, p, p_sink = softmax(s, np.float64(sink))
    d = np.ones_like(p)
    if problem.dropout_threshold:
        state = np.asarray(arrays["rng_state"])
        indices = rows + problem.query_start, keys + problem.key_start
        kept = philox.keep(state, problem.dropout_p, sequence.number * problem.nheads + h, *indices)
        d = kept * philox.keep_scale(problem.dropout_p)
    return Head(
        *(sequence, h, rows, rows_q, rows_k, q, k, v, used, t, s, p, p_sink, d, lse, (p * d) @ v),
        functions=functions,
        place=place,
    )


def _scaled(problem: Problem, arrays: Arrays, sequence: Sequence, place: Any, name: str, stored: Float) -> Float:
    """Return the stored keys or values of one head times their scales."""
    *index, h_kv = place
    scale = np.asarray(arrays[SCALES_OF[name]], np.float64)
    found: Float = stored * scales(problem, sequence, scale, tuple(index), slice(h_kv, h_kv + 1))
    return found


def _score_terms(problem: Problem, arrays: Arrays, sequence: Sequence, h: int, rows: Ints) -> Float | float:
    """Return bias_ij - slope |p - c|."""
    terms: Float | float = 0.0
    if problem.bias is not None:
        terms = terms + widen(score_tile(np.asarray(arrays["bias"]), sequence, h, rows), problem.bias.dtype)
    if problem.alibi_slopes is not None:
        slopes = np.asarray(arrays["alibi_slopes"], np.float64)
        slope = slopes[h] if slopes.ndim == 1 else slopes[sequence.number, h]
        c = np.arange(sequence.n_k) - sequence.leftpad
        terms = terms - slope * np.abs(sequence.positions()[rows, None] - c)
    return terms


def softmax(s: npt.NDArray[Any], sink: np.floating[Any]) -> tuple[npt.NDArray[Any], ...]:
    """Return lse, P and the sink's probability per query, in the dtype of s; -inf and zeros without visible keys.

    P is divided by the sum of its row, because exp(s - lse) would repeat the rounding error of lse. That error is large
    for large scores.
    """
    top = np.maximum(s.max(axis=1, initial=-np.inf), sink)
    safe = np.where(np.isfinite(top), top, s.dtype.type(0))
    weights, of_sink = np.exp(s - safe[:, None]), np.exp(sink - safe)
    total = weights.sum(axis=1) + of_sink
    divisor = np.where(total == 0, s.dtype.type(1), total)
    with np.errstate(divide="ignore"):
        return safe + np.log(total), weights / divisor[:, None], of_sink / divisor


def _plane(array: npt.NDArray[Any], sequence: Sequence, h: int) -> npt.NDArray[Any]:
    """Return a head's (seqlen_q or 1, n_k or 1) view of a (batch, nheads, seqlen_q, seqlen_k) array."""
    batch, nheads = array.shape[:2]
    plane = array[sequence.number if batch > 1 else 0, h if nheads > 1 else 0]
    return np.asarray(plane[:, : sequence.n_k if plane.shape[1] > 1 else 1])


def score_tile(array: npt.NDArray[Any], sequence: Sequence, h: int, rows: Ints) -> npt.NDArray[Any]:
    """Return the queries' rows of a head's view, or the single row that is broadcast."""
    plane = _plane(array, sequence, h)
    return plane[rows] if plane.shape[0] > 1 else plane


def _add_dbias(dbias: npt.NDArray[Any], head: Head, ds: npt.NDArray[Any]) -> None:
    plane = _plane(dbias, head.sequence, head.h)
    if plane.shape[1] == 1:
        ds = ds.sum(axis=1, keepdims=True)
    if plane.shape[0] == 1:
        plane += ds.sum(axis=0, keepdims=True)
    else:
        plane[head.rows] += ds


def _rows_q(problem: Problem, sequence: Sequence, h: int, rows: Ints) -> tuple[Any, ...]:
    return (sequence.row_q + rows, h) if problem.packed_q else (sequence.number, rows, h)


def rows_lse(problem: Problem, head: Head) -> tuple[Any, ...]:
    s = head.sequence
    return (head.h, s.row_q + head.rows) if problem.packed_q else (s.number, head.h, head.rows)


def append(problem: Problem, arrays: Arrays) -> Float | None:
    """Write new_k (rotated) and new_v into k and v in place; return the rotated q (float64), or None without rotary.

    A quantised cache gets stored values and scales.
    """
    dtype = problem.q.dtype
    new_k, new_v = (raw(arrays[name], dtype) for name in ("new_k", "new_v"))
    lengths = np.asarray(arrays["cache_seqlens"]).astype(np.int64)
    rows = np.arange(problem.q.shape[1]) if problem.rotation.by_row else np.zeros(problem.q.shape[1], np.int64)
    q = np.zeros(problem.q.shape) if problem.rotary_dim else None
    for b in range(problem.batch):
        slots = lengths[b] + np.arange(problem.seqlen_new)
        if problem.block_table is not None:
            where: tuple[Any, ...] = (arrays["block_table"][b][slots // problem.page_size], slots % problem.page_size)
        else:
            where = (b if problem.cache_batch_idx is None else arrays["cache_batch_idx"][b], slots)
        _write(problem, arrays, "v", where, new_v[b])
        if q is None:
            _write(problem, arrays, "k", where, new_k[b])
        else:
            _write(problem, arrays, "k", where, rotate(problem, arrays, widen(new_k[b], dtype), slots))
            q[b] = rotate(problem, arrays, widen(arrays["q"][b], dtype), lengths[b] + rows)
    return q


def _write(problem: Problem, arrays: Arrays, name: str, where: Any, values: npt.NDArray[Any]) -> None:
    """Write new keys or values, in float64 or as raw values of q's dtype, into the cache."""
    cache, dtype, given = problem.arrays[name], problem.dtype, values.dtype == np.float64
    to = raw(arrays[name], cache.dtype)
    if problem.quantised:
        to[where], arrays[SCALES_OF[name]][where] = quantise(values if given else widen(values, dtype), cache.dtype)
    else:
        to[where] = narrow(values, dtype) if given else values


def rotate(problem: Problem, arrays: Arrays, x: Float, positions: npt.NDArray[np.int64]) -> Float:
    """Rotate the first rotary_dim values of x (rows, nheads, head_dim) by the angles at `positions`."""
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
