"""Selected keys: a list is a set of key slots, and a call with lists equals the call that masks all other keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.testing import Case, make_inputs
from harness.backends import Engine
from harness.checks import bits, refused, run
from harness.selection import every_backend

pytestmark = every_backend()

DENSE = Case("lists", batch=2, seqlen_q=70, seqlen_k=90, group=2, causal=True, sink=True, kv_indices="heads", dlse=True)
LONG = Case("long_lists", batch=1, seqlen_q=300, seqlen_k=400, nheads_kv=1, group=3, kv_indices="shared", bias="row")
WIDE = Case("many_heads", seqlen_q=3, group=90, nheads_kv=1, kv_indices="shared", dropout_p=0.3, dlse=True)
CASES = [DENSE, LONG, WIDE]


def results(inputs: testing.CaseInputs, engine: Engine) -> dict[str, Any]:
    return {**run(inputs, "forward", engine), **run(inputs, "backward", engine)}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    for name, array in one.items():
        assert array is two[name] is None or np.array_equal(bits(array), bits(two[name])), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case: Case, engine: Engine) -> None:
    inputs = make_inputs(case)
    if refused(inputs, "backward", engine):
        return
    engine.use(threads=1)
    want = results(inputs, engine)
    for threads in (2, 5):
        engine.use(threads=threads)
        assert_same(want, results(inputs, engine))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_and_repetition_of_indices_change_nothing(case: Case, engine: Engine) -> None:
    inputs = make_inputs(case)
    if refused(inputs, "backward", engine):
        return
    want = results(inputs, engine)
    lists = np.asarray(inputs.arguments["kv_indices"])
    longer = np.concatenate([lists, np.full_like(lists[..., :2], -1), lists[..., :5]], axis=-1)
    inputs.arguments["kv_indices"] = np.random.default_rng(0).permuted(longer, axis=-1)
    assert_same(want, results(inputs, engine))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_give_the_result_of_a_mask(case: Case, engine: Engine) -> None:
    """Dropout and the bias go by the slot of a key, not by its place in a list."""
    inputs = make_inputs(case)
    if refused(inputs, "backward", engine):
        return
    got = results(inputs, engine)
    lists = np.asarray(inputs.arguments.pop("kv_indices"))
    lists = lists if lists.ndim == 4 else lists[:, None]
    seen = (lists[..., None] == np.arange(case.seqlen_k)).any(axis=-2)
    for name in ("k", "v"):  # without lists every key is read
        array = inputs.arguments[name]
        array[...] = np.nan_to_num(array, posinf=0.0)
    inputs.arguments["mask"] = np.repeat(seen, case.nheads // seen.shape[1], axis=1)
    for direction in testing.PASSES:
        assert not testing.compare(testing.expected(inputs, direction), got)


def test_packed_sequences_give_the_bits_of_a_batch(engine: Engine) -> None:
    inputs = make_inputs(DENSE)
    if refused(inputs, "forward", engine):
        return
    dense = {**inputs.arguments, "backend": engine.backend}
    lists = np.asarray(dense.pop("kv_indices"))
    out, lse = anyattn.attention_forward(**dense, kv_indices=lists)
    packed = dense | {name: dense[name].reshape(-1, *dense[name].shape[2:]) for name in "qkv"}
    lists = lists.swapaxes(0, 1).reshape(DENSE.nheads_kv, -1, lists.shape[-1])
    starts = {"cu_seqlens_q": [0, 70, 140], "cu_seqlens_k": [0, 90, 180]}
    got = anyattn.attention_forward(**packed, **starts, kv_indices=lists)
    assert np.array_equal(got[0].reshape(out.shape), out)
    assert np.array_equal(got[1].reshape(-1, 2, 70).swapaxes(0, 1), lse)


def test_empty_lists_give_zeros(engine: Engine) -> None:
    inputs = make_inputs(DENSE)
    if refused(inputs, "backward", engine):
        return
    inputs.arguments["kv_indices"] = np.zeros((2, 70, 0), np.int64)
    got = results(inputs, engine)
    sink = np.broadcast_to(inputs.arguments["sink"][:, None], (2, 4, 70))
    assert not got["out"].any() and not any(got[name].any() for name in ("dq", "dk", "dv"))
    np.testing.assert_allclose(got["lse"], sink, rtol=1e-6)


def test_lists_select_slots_of_a_cache(engine: Engine) -> None:
    inputs = make_inputs(DENSE)
    if refused(inputs, "forward", engine):
        return
    rng, shape = np.random.default_rng(0), (2, 90, 2, 40)
    k, v, new = (rng.standard_normal(shape, np.float32) for _ in range(3))
    lists = rng.integers(-1, 90, (2, 3, 20))
    q, flags = rng.standard_normal((2, 3, 4, 40), np.float32), {"causal": True, "backend": engine.backend}
    got = anyattn.attention_with_kvcache(
        q, k, v, k=new[:, :3], v=new[:, 3:6], cache_seqlens=40, kv_indices=lists, **flags
    )
    want = anyattn.attention(q, k, v, seqused_k=[43, 43], kv_indices=lists, **flags)
    assert np.array_equal(got, want)
