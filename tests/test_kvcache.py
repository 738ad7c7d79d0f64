"""The KV cache: what append writes and what it leaves alone, rotary, pages of any size, decoding against prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import DTYPES, Case
from engines import Engine
from inputs import NUMPY_DTYPES, build

import anyattn
from anyattn import accuracy

INTERPRETED = True


@dataclass(frozen=True)
class Setup:
    """One call with an append; every array of it is drawn from the seed."""

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
    seed: int = 0

    def draw(self) -> dict[str, Any]:
        """Arguments of attention_with_kvcache."""
        rng = np.random.default_rng(self.seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(NUMPY_DTYPES[self.dtype])

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
        return given | {"causal": self.causal}


def place(given: dict[str, Any], b: int, slot: int) -> tuple[int, int]:
    """Where a logical slot of a sequence lies in the cache."""
    if "block_table" in given:
        size = given["k_cache"].shape[1]
        return int(given["block_table"][b, slot // size]), slot % size
    return int(given["cache_batch_idx"][b]) if "cache_batch_idx" in given else b, slot


def rotate(x: np.ndarray, position: int, given: dict[str, Any]) -> np.ndarray:
    """Each pair turned by its angle, as complex numbers, in float64. x: (nheads, head_dim)."""
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


SETUPS = [
    *[Setup(dtype=dtype) for dtype in DTYPES],
    *[Setup(dtype=dtype, rotary_dim=24) for dtype in DTYPES],
    Setup(rotary_dim=10, interleaved=False),
    Setup(rotary_dim=24, interleaved=False, causal=False),
    Setup(rotary_dim=2, causal=False, head_dim=3, head_dim_v=5),
    Setup(entries=True),
    Setup(entries=True, rotary_dim=16, dtype="float16"),
    *[Setup(page_size=size, seed=size, rotary_dim=8) for size in (1, 3, 16, 64)],
    Setup(page_size=7, dtype="bfloat16", interleaved=False, rotary_dim=24),
    Setup(new=0),
    Setup(new=40, slots=40, batch=2),
    Setup(new=1, rows=1, group=8),
    Setup(batch=0),
    Setup(rows=9, new=2, rotary_dim=24),
]  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_append_writes_exactly_the_new_slots(setup: Setup, engine: Engine) -> None:
    given = setup.draw()
    old_k, old_v = given["k_cache"].copy(), given["v_cache"].copy()
    anyattn.attention_with_kvcache(**given, backend=engine.backend)
    tolerance = accuracy.EPS[setup.dtype] / 2 + 2 * accuracy.EPS["float64" if setup.dtype == "float64" else "float32"]
    for b in range(setup.batch):
        for t in range(setup.new):
            slot = int(given["cache_seqlens"][b]) + t
            where = place(given, b, slot)
            want = rotate(given["k"][b, t], slot, given)
            got = given["k_cache"][where].astype(np.float64)
            rotated = setup.rotary_dim
            assert (np.abs(got - want) <= tolerance * np.abs(want).max() * (rotated > 0)).all()
            assert np.array_equal(got[:, rotated:], want[:, rotated:])
            assert np.array_equal(given["v_cache"][where], given["v"][b, t])
            old_k[where], old_v[where] = given["k_cache"][where], given["v_cache"][where]
    assert np.array_equal(given["k_cache"], old_k) and np.array_equal(given["v_cache"], old_v), (
        "another slot was written"
    )


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_attention_over_what_was_appended(setup: Setup, engine: Engine) -> None:
    """The same as rotating q, gathering every sequence's keys and attending to each sequence alone."""
    given = setup.draw()
    out, lse = anyattn.attention_with_kvcache(**given, return_lse=True, backend=engine.backend)
    for b in range(setup.batch):
        length = int(given["cache_seqlens"][b])
        places = [place(given, b, slot) for slot in range(length + setup.new)]
        k = np.array([given["k_cache"][where] for where in places]).reshape(1, -1, setup.nheads_kv, setup.head_dim)
        v = np.array([given["v_cache"][where] for where in places]).reshape(1, -1, setup.nheads_kv, setup.head_dim_v)
        rows = [rotate(given["q"][b, i], length + (i if setup.causal else 0), given) for i in range(setup.rows)]
        q = np.array(rows)[None].astype(given["q"].dtype)
        want = _budgets(q, k.astype(q.dtype), v.astype(q.dtype), setup.causal)
        # A rotated q may round the other way: one unit in the last place of q is one more eps on every score.
        extra = accuracy.EPS[setup.dtype] * (setup.rotary_dim > 0)
        for name, got in (("out", out), ("lse", lse)):
            limit = want[name].budget + extra * want["lse"].magnitude.max(initial=0.0)
            assert want[name].error(got[b : b + 1]) <= limit, name


def _budgets(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> dict[str, accuracy.Expected]:
    inputs = build(Case("gathered", batch=1, seqlen_q=1, seqlen_k=1, nheads_kv=1, head_dim=1, head_dim_v=1))
    inputs.arguments = {"q": q, "k": k, "v": v, "causal": causal}
    return accuracy.expected_forward(*inputs.canonical())


@pytest.mark.parametrize("page_size", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_steps_equal_prefill(dtype: str, page_size: int, engine: Engine) -> None:
    """33 single steps that append their own key give the rows of one causal call."""
    steps = 33
    case = Case("prefill", batch=2, seqlen_q=steps, seqlen_k=steps, group=3, dtype=dtype, causal=True)
    inputs = build(case)
    q, k, v = (inputs.arguments[name] for name in "qkv")
    want = accuracy.expected_forward(*inputs.canonical())
    lead = (2, steps)
    table = None
    if page_size:
        columns = -(-steps // page_size)
        table = np.arange(2 * columns, dtype=np.int32)[::-1].reshape(2, columns)
        lead = (2 * columns, page_size)
    k_cache = np.full((*lead, *k.shape[2:]), np.nan, k.dtype)
    v_cache = np.full((*lead, *v.shape[2:]), np.nan, v.dtype)
    outs, lses = [], []
    for t in range(steps):
        now = slice(t, t + 1)
        out, lse = anyattn.attention_with_kvcache(
            q[:, now], k_cache, v_cache, k=k[:, now], v=v[:, now], cache_seqlens=t, block_table=table, causal=True,
            return_lse=True, backend=engine.backend,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    assert not accuracy.check(want, {"out": np.concatenate(outs, 1), "lse": np.concatenate(lses, 2)})


def test_prefill_in_chunks_equals_prefill(engine: Engine) -> None:
    """Also with left padding and a window."""
    case = Case("chunks", batch=3, seqlen_q=30, seqlen_k=30, group=2, causal=True, window=(12, None), offset="", seed=1)
    inputs = build(case)
    q, k, v = (inputs.arguments[name] for name in "qkv")
    want = accuracy.expected_forward(*inputs.canonical())
    pad = 4
    k_cache, v_cache = (np.full((3, 36, *x.shape[2:]), np.nan, x.dtype) for x in (k, v))
    outs, lses = [], []
    for start, stop in ((0, 7), (7, 8), (8, 30)):
        out, lse = anyattn.attention_with_kvcache(
            q[:, start:stop], k_cache, v_cache, k=k[:, start:stop], v=v[:, start:stop], cache_seqlens=pad + start,
            leftpad_k=[pad] * 3, causal=True, window=(12, None), return_lse=True, backend=engine.backend,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    assert not accuracy.check(want, {"out": np.concatenate(outs, 1), "lse": np.concatenate(lses, 2)})


def test_without_new_keys_nothing_is_written(engine: Engine) -> None:
    given = Setup().draw()
    del given["k"], given["v"]
    before = given["k_cache"].copy(), given["v_cache"].copy()
    out = anyattn.attention_with_kvcache(**given, backend=engine.backend)
    lengths = given["cache_seqlens"]
    flags = {"causal": True, "backend": engine.backend}
    want = anyattn.attention(given["q"], given["k_cache"], given["v_cache"], seqused_k=lengths, **flags)
    assert np.array_equal(out, want)
    assert np.array_equal(given["k_cache"], before[0]) and np.array_equal(given["v_cache"], before[1])


def test_num_splits_changes_nothing(engine: Engine) -> None:
    outs = [anyattn.attention_with_kvcache(**Setup().draw(), num_splits=n, backend=engine.backend) for n in (0, 1, 7)]
    assert all(np.array_equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_that_are_views_of_larger_arrays(interleaved: bool, engine: Engine) -> None:
    """q, k and v as a model has them that projects all three at once, and the first rows of it; cos and sin likewise.

    The rotated q is an array of its own, with strides of its own.
    """
    setup = Setup(rotary_dim=24, head_dim_v=24, interleaved=interleaved)
    want_given, given = setup.draw(), setup.draw()
    want = anyattn.attention_with_kvcache(**want_given, backend=engine.backend)
    fused = np.full((3, 9, 8, 24), np.nan, np.float32)  # heads of q, then of k, then of v
    views = {"q": fused[:, 2:7, :4], "k": fused[:, 2:7, 4:6], "v": fused[:, 2:7, 6:]}
    angles = np.full((45, 36), np.nan, np.float32)
    views |= {"rotary_cos": angles[:, :12], "rotary_sin": np.full((45, 20), np.nan, np.float32)[:, 4:16]}
    for name, view in views.items():
        view[...] = given[name]
    got = anyattn.attention_with_kvcache(**given | views, backend=engine.backend)
    assert np.array_equal(got, want)
    assert np.array_equal(given["k_cache"], want_given["k_cache"])
    assert np.array_equal(given["v_cache"], want_given["v_cache"])


def test_cache_that_is_a_view_of_a_larger_one(engine: Engine) -> None:
    """One layer of a stacked cache, interleaved with v."""
    given = Setup(head_dim_v=24).draw()
    stacked = np.full((3, 40, 4, 2, 2, 24), np.nan, np.float32)  # (batch, slots, layers, k or v, nheads_kv, head_dim)
    stacked[:, :, 1, 0], stacked[:, :, 1, 1] = given["k_cache"], given["v_cache"]
    want = anyattn.attention_with_kvcache(**given, backend=engine.backend)
    given |= {"k_cache": stacked[:, :, 1, 0], "v_cache": stacked[:, :, 1, 1]}
    again = Setup(head_dim_v=24).draw()
    given["k_cache"][...], given["v_cache"][...] = again["k_cache"], again["v_cache"]
    got = anyattn.attention_with_kvcache(**given, backend=engine.backend)
    assert np.array_equal(got, want)
    assert np.isnan(stacked[:, :, [0, 2, 3]]).all()
