"""The KV cache: what append writes and what it leaves alone, rotary, pages of any size, decoding against prefill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import anyattn
from anyattn import testing
from anyattn.testing import Case, make_inputs
from anyattn.testing.cases import DTYPES, STORED
from harness.backends import Engine
from harness.kvcache_cases import AppendCase, problems_of
from harness.selection import every_backend

pytestmark = every_backend(interpreter=True)


SETUPS = [
    *[AppendCase(dtype=dtype) for dtype in DTYPES],
    *[AppendCase(dtype=dtype, rotary_dim=24) for dtype in DTYPES],
    AppendCase(rotary_dim=10, interleaved=False),
    AppendCase(rotary_dim=24, interleaved=False, causal=False),
    AppendCase(rotary_dim=2, causal=False, head_dim=3, head_dim_v=5),
    AppendCase(entries=True),
    AppendCase(entries=True, rotary_dim=16, dtype="float16"),
    *[AppendCase(page_size=size, seed=size, rotary_dim=8) for size in (1, 3, 16, 64)],
    AppendCase(page_size=7, dtype="bfloat16", interleaved=False, rotary_dim=24),
    AppendCase(new=0),
    AppendCase(new=0, rows=0, slots=1, rotary_dim=38, head_dim=64, causal=False, seed=401659527),  # nothing to rotate
    AppendCase(new=40, slots=40, batch=2),
    AppendCase(new=1, rows=1, group=8),
    AppendCase(batch=0),
    AppendCase(rows=9, new=2, rotary_dim=24),
    AppendCase(leftpad=True, window=(7, None), rows_used=True),
    AppendCase(causal=False, window=(9, 4), rotary_dim=24),
]  # fmt: skip
QUANTISED = [
    *[AppendCase(dtype=dtype, stored="int8", rotary_dim=8) for dtype in DTYPES],
    *[AppendCase(stored=stored, seed=1) for stored in STORED],
    *[AppendCase(stored=stored, dtype="bfloat16", page_size=5, rotary_dim=24) for stored in STORED],
    AppendCase(stored="float8_e4m3fn", page_size=1, new=1, rows=1, group=8),
    AppendCase(stored="float8_e4m3fn", dtype="float16", entries=True, rotary_dim=16, interleaved=False),
    AppendCase(stored="int8", new=1, rows=1, group=4, head_dim=128, head_dim_v=128),
    AppendCase(stored="int8", leftpad=True, window=(7, None), rows_used=True),
    AppendCase(stored="float8_e5m2", new=40, slots=40, batch=2, head_dim=3, head_dim_v=5),
    AppendCase(stored="int8", page_size=16, rows=9, new=70, slots=90, rotary_dim=24),
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_append_and_attention(setup: AppendCase, engine: Engine) -> None:
    assert not problems_of(setup, engine.backend)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_arrays_laid_out_at_random(setup: AppendCase, seed: int, engine: Engine) -> None:
    assert not problems_of(replace(setup, scattered=True, seed=setup.seed + 100 * seed), engine.backend)


@every_backend(interpreter=True, only=("cpu", "numpy", "triton"))
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("setup", QUANTISED, ids=str)
def test_append_to_a_quantised_cache(setup: AppendCase, scattered: bool, engine: Engine) -> None:
    """Codes and scales have the bits of the definition on every backend."""
    assert not problems_of(replace(setup, scattered=scattered), engine.backend)


def is_slow(engine: Engine, dtype: str, page_size: int) -> bool:
    """Return whether Triton's interpreter takes seconds for what one of the four shows."""
    return engine.interpreted and (dtype, page_size) != ("bfloat16", 5)


@every_backend(interpreter=True, full_if=is_slow)
@pytest.mark.parametrize("page_size", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_steps_equal_prefill(dtype: str, page_size: int, engine: Engine) -> None:
    """Single steps that append their own key give the rows of one causal call."""
    steps = 12 if engine.interpreted else 33
    case = Case("prefill", batch=2, seqlen_q=steps, seqlen_k=steps, group=3, dtype=dtype, causal=True)
    inputs = make_inputs(case)
    q, k, v = (inputs.arguments[name] for name in "qkv")
    want = testing.expected(inputs)
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
    assert not testing.compare(want, {"out": np.concatenate(outs, 1), "lse": np.concatenate(lses, 2)})


def test_prefill_in_chunks_equals_prefill(engine: Engine) -> None:
    """Also with left padding and a window."""
    case = Case("chunks", batch=3, seqlen_q=30, seqlen_k=30, group=2, causal=True, window=(12, None), offset="", seed=1)
    inputs = make_inputs(case)
    q, k, v = (inputs.arguments[name] for name in "qkv")
    want = testing.expected(inputs)
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
    assert not testing.compare(want, {"out": np.concatenate(outs, 1), "lse": np.concatenate(lses, 2)})


def test_without_new_keys_nothing_is_written(engine: Engine) -> None:
    given = AppendCase().draw()
    del given["k"], given["v"]
    before = given["k_cache"].copy(), given["v_cache"].copy()
    out = anyattn.attention_with_kvcache(**given, backend=engine.backend)
    lengths = given["cache_seqlens"]
    flags = {"causal": True, "backend": engine.backend}
    want = anyattn.attention(given["q"], given["k_cache"], given["v_cache"], seqused_k=lengths, **flags)
    assert np.array_equal(out, want)
    assert np.array_equal(given["k_cache"], before[0]) and np.array_equal(given["v_cache"], before[1])


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_expanded_cache_is_refused(name: str, engine: Engine) -> None:
    """Its sequences share memory, so that each would overwrite the others' keys."""
    given = {x: torch.from_numpy(y) if isinstance(y, np.ndarray) else y for x, y in AppendCase().draw().items()}
    given[name] = given[name][:1].expand(3, -1, -1, -1)
    before = {x: given[x].clone() for x in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=f"{name} must not be expanded"):
        anyattn.attention_with_kvcache(**given, backend=engine.backend)
    assert all(torch.equal(given[x], y) for x, y in before.items())


def test_num_splits_changes_nothing(engine: Engine) -> None:
    outs = [
        anyattn.attention_with_kvcache(**AppendCase().draw(), num_splits=n, backend=engine.backend) for n in (0, 1, 7)
    ]
    assert all(np.array_equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_that_are_views_of_larger_arrays(interleaved: bool, engine: Engine) -> None:
    """q, k and v as a model has them that projects all three at once, and the first rows of it; cos and sin likewise.

    The rotated q is an array of its own, with strides of its own.
    """
    setup = AppendCase(rotary_dim=24, head_dim_v=24, interleaved=interleaved)
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
    given = AppendCase(head_dim_v=24).draw()
    stacked = np.full((3, 40, 4, 2, 2, 24), np.nan, np.float32)  # (batch, slots, layers, k or v, nheads_kv, head_dim)
    stacked[:, :, 1, 0], stacked[:, :, 1, 1] = given["k_cache"], given["v_cache"]
    want = anyattn.attention_with_kvcache(**given, backend=engine.backend)
    given |= {"k_cache": stacked[:, :, 1, 0], "v_cache": stacked[:, :, 1, 1]}
    again = AppendCase(head_dim_v=24).draw()
    given["k_cache"][...], given["v_cache"][...] = again["k_cache"], again["v_cache"]
    got = anyattn.attention_with_kvcache(**given, backend=engine.backend)
    assert np.array_equal(got, want)
    assert np.isnan(stacked[:, :, [0, 2, 3]]).all()
