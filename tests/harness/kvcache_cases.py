"""Calls with a KV cache, and the checks after each: slots that were written, slots that were not, and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import anyattn
from anyattn import testing
from anyattn.definition import accuracy
from anyattn.definition.dtypes import DTYPES
from anyattn.definition.quantised import quantise
from anyattn.testing import Case, make_inputs, numpy_dtype
from anyattn.testing.layouts import around, scattered

Buffers = dict[str, np.ndarray]
WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")


@dataclass(frozen=True)
class AppendCase:
    """Call with an append, whose arrays are sampled from the seed.

    It is not a `testing.Case`, because it has slots of a cache, new keys and a rotation, and its writes are checked.
    """

    dtype: str = "float32"
    batch: int = 3
    slots: int = 40
    new: int = 5
    rows: int = 5
    nheads_kv: int = 2
    group: int = 2
    head_dim: int = 24
    head_dim_v: int = 16
    page_size: int = 0  # 0: dense
    entries: bool = False  # cache_batch_idx
    rotary_dim: int = 0
    interleaved: bool = True
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    leftpad: bool = False
    rows_used: bool = False  # seqused_q
    stored: str = ""  # dtype of a quantised cache
    scattered: bool = False  # every array has a random layout; rows of the caches stay contiguous
    seed: int = 0

    @property
    def by_row(self) -> bool:
        """Return whether rotary rotates each query at its own position."""
        return self.causal or self.window not in (None, (None, None))

    def draw(self) -> dict[str, Any]:
        """Return arguments of attention_with_kvcache."""
        rng = np.random.default_rng(self.seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(numpy_dtype(self.dtype))

        lengths = rng.integers(0, self.slots - self.new + 1, self.batch)
        given: dict[str, Any] = {"q": normal(self.batch, self.rows, self.nheads_kv * self.group, self.head_dim)}
        lead = (self.batch + 2 * self.entries, self.slots)
        if self.page_size:
            columns = -(-self.slots // self.page_size)
            lead = (self.batch * columns + 2, self.page_size)
            order = rng.permutation(lead[0])[: self.batch * columns]
            given["block_table"] = order.reshape(self.batch, columns).astype(np.int32)
        given["k_cache"] = normal(*lead, self.nheads_kv, self.head_dim)
        given["v_cache"] = normal(*lead, self.nheads_kv, self.head_dim_v)
        for name in ("k", "v") if self.stored else ():
            codes, scale = quantise(given[f"{name}_cache"], self.stored)
            given[f"{name}_cache"], given[f"{name}_scale"] = codes.view(numpy_dtype(self.stored)), scale
        given["k"] = normal(self.batch, self.new, self.nheads_kv, self.head_dim)
        given["v"] = normal(self.batch, self.new, self.nheads_kv, self.head_dim_v)
        given["cache_seqlens"] = lengths.astype(np.int32)
        if self.entries:
            given["cache_batch_idx"] = rng.permutation(lead[0])[: self.batch].astype(np.int32)
        if self.rotary_dim:
            angles = rng.uniform(-7, 7, (self.slots + self.rows, self.rotary_dim // 2))
            kind = np.float64 if self.dtype == "float64" else np.float32
            given["rotary_cos"], given["rotary_sin"] = np.cos(angles).astype(kind), np.sin(angles).astype(kind)
            given["rotary_interleaved"] = self.interleaved
        if self.leftpad:
            given["leftpad_k"] = rng.integers(0, lengths + 1).astype(np.int32)
        if self.rows_used:
            given["seqused_q"] = rng.integers(0, self.rows + 1, self.batch).astype(np.int32)
        return given | {"causal": self.causal, "window": self.window}

    def place(self) -> tuple[dict[str, Any], Buffers]:
        """Return the arguments, with random layouts if `scattered` is set, and the buffers around the arrays."""
        given, rng = self.draw(), np.random.default_rng(self.seed)
        buffers: Buffers = {}
        for name, x in given.items() if self.scattered else ():
            if isinstance(x, np.ndarray):
                given[name], buffers[name] = scattered(x, rng, rows=name in WRITTEN)
        return given, buffers


def place(given: dict[str, Any], b: int, slot: int) -> tuple[int, int]:
    """Return the index in the cache of a logical slot of a sequence."""
    if "block_table" in given:
        size = given["k_cache"].shape[1]
        return int(given["block_table"][b, slot // size]), slot % size
    return int(given["cache_batch_idx"][b]) if "cache_batch_idx" in given else b, slot


def rotate(x: np.ndarray, position: int, given: dict[str, Any]) -> np.ndarray:
    """Return x (nheads, head_dim) with each pair rotated by its angle, as complex numbers, in float64."""
    if "rotary_cos" not in given:
        return x.astype(np.float64)
    cos, sin = given["rotary_cos"][position].astype(np.float64), given["rotary_sin"][position].astype(np.float64)
    half = len(cos)
    pairs = (slice(0, half), slice(half, 2 * half))
    if given["rotary_interleaved"]:
        pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    out = x.astype(np.float64)
    turned = (out[:, pairs[0]] + 1j * out[:, pairs[1]]) * (cos + 1j * sin)
    out[:, pairs[0]], out[:, pairs[1]] = turned.real, turned.imag
    return out


def problems_of(setup: AppendCase, backend: str) -> list[str]:
    """Return a line for each fault of the call."""
    given, buffers = setup.place()
    before = {name: given[name].copy() for name in WRITTEN if name in given}
    beside = {name: around(given[name], buffer) for name, buffer in buffers.items()}
    inputs = {name: given[name].tobytes() for name in buffers if name not in before}
    out, lse = anyattn.attention_with_kvcache(**given, return_lse=True, backend=backend)
    wrong = _appended(setup, given, before)
    wrong += [
        f"memory around {name} was written" for name in buffers if around(given[name], buffers[name]) != beside[name]
    ]
    wrong += [f"{name} was written" for name, old in inputs.items() if given[name].tobytes() != old]
    return wrong + _attended(setup, given, out, lse)


def _appended(setup: AppendCase, given: dict[str, Any], before: dict[str, np.ndarray]) -> list[str]:
    """Return faults of the cache: new slots must hold the rotated k and v, and other slots must not change."""
    tolerance = DTYPES[setup.dtype].eps / 2 + 2 * DTYPES["float64" if setup.dtype == "float64" else "float32"].eps
    rotated = setup.rotary_dim
    wrong = []
    for b in range(setup.batch):
        for t in range(setup.new):
            slot = int(given["cache_seqlens"][b]) + t
            where = place(given, b, slot)
            want = rotate(given["k"][b, t], slot, given)
            got = given["k_cache"][where].astype(np.float64)
            if setup.stored:
                wrong += _quantised(setup, given, where, (b, t), want)
                for name, old in before.items():
                    old[where] = given[name][where]
                continue
            near = np.abs(got - want) <= tolerance * np.abs(want).max() * (rotated > 0)
            if not near.all() or not np.array_equal(got[:, rotated:], want[:, rotated:]):
                wrong.append(f"key {t} of sequence {b} is wrong in the cache")
            if not np.array_equal(given["v_cache"][where], given["v"][b, t]):
                wrong.append(f"value {t} of sequence {b} is wrong in the cache")
            for name, old in before.items():
                old[where] = given[name][where]
    return wrong + [
        f"another slot of {name} was written" for name, old in before.items() if not _same(given[name], old)
    ]


def _quantised(
    setup: AppendCase, given: dict[str, Any], where: tuple[int, int], token: tuple[int, int], want_k: np.ndarray
) -> list[str]:
    """Return faults of the codes and scales of a slot, which are compared bit by bit."""
    b, t = token
    wrong = []
    for name, want in (("k", want_k), ("v", given["v"][b, t].astype(np.float64))):
        codes, scale = quantise(want, setup.stored)
        got = given[f"{name}_cache"][where], given[f"{name}_scale"][where]
        if got[0].tobytes() != codes.tobytes() or got[1].tobytes() != scale.tobytes():
            wrong.append(f"{name} {t} of sequence {b} is wrong in the cache")
    return wrong


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays have the same bits. Slots that are not in use may hold NaN."""
    return a.tobytes() == b.tobytes()


def _attended(setup: AppendCase, given: dict[str, Any], out: np.ndarray, lse: np.ndarray) -> list[str]:
    """Return faults of out and lse, compared with attention over the gathered keys of each sequence alone."""
    wrong = []
    for b in range(setup.batch):
        length = int(given["cache_seqlens"][b])
        first = int(given["leftpad_k"][b]) if setup.leftpad else 0
        n_q = int(given["seqused_q"][b]) if setup.rows_used else setup.rows
        places = [place(given, b, slot) for slot in range(first, length + setup.new)]
        k = np.array([given["k_cache"][where] for where in places]).reshape(1, -1, setup.nheads_kv, setup.head_dim)
        v = np.array([given["v_cache"][where] for where in places]).reshape(1, -1, setup.nheads_kv, setup.head_dim_v)
        rows = [rotate(given["q"][b, i], length + (i if setup.by_row else 0), given) for i in range(n_q)]
        q = np.array(rows).reshape(1, n_q, *given["q"].shape[2:]).astype(given["q"].dtype)
        stored = {"k": k.astype(given["k_cache"].dtype), "v": v.astype(given["v_cache"].dtype)}
        for name in ("k_scale", "v_scale") if setup.stored else ():
            stored[name] = np.array([given[name][where] for where in places]).reshape(1, -1, setup.nheads_kv)
        want = _budgets(setup, q, stored)
        # A rotated q may be rounded differently. One unit in its last place adds one eps to the error of every score.
        extra = DTYPES[setup.dtype].eps * (setup.rotary_dim > 0)
        for name, got in (("out", out[b : b + 1, :n_q]), ("lse", lse[b : b + 1, :, :n_q])):
            limit = want[name].budget + extra * want["lse"].magnitude.max(initial=0.0)
            if not want[name].error(got) <= limit:
                wrong.append(f"{name} of sequence {b}: error {want[name].error(got)} > {limit}")
    return wrong


def _budgets(setup: AppendCase, q: np.ndarray, stored: dict[str, np.ndarray]) -> dict[str, accuracy.Expected]:
    inputs = make_inputs(Case("gathered", batch=1, seqlen_q=1, seqlen_k=1, nheads_kv=1, head_dim=1, head_dim_v=1))
    inputs.arguments = {"q": q, **stored, "causal": setup.causal, "window": setup.window}
    return testing.expected(inputs)
