"""Reproducible bits: from run to run, for any number of threads, and for a sequence in any batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import anyattn
from anyattn.config import settings
from anyattn.testing import Case, CaseInputs, make_inputs
from anyattn.testing.cases import DTYPES
from harness.backends import Engine
from harness.cases import named
from harness.selection import every_backend

pytestmark = every_backend()

BIG = Case("several_tiles", batch=2, seqlen_q=300, seqlen_k=411, group=2, causal=True, sink=True, dlse=True)
CASES = [
    *[replace(BIG, name=f"several_tiles_{dtype}", dtype=dtype) for dtype in DTYPES],
    replace(BIG, name="one_head", batch=1, nheads_kv=1, group=1, bias="row", dropout_p=0.2),
    replace(BIG, name="many_heads_one_kv", nheads_kv=1, group=8, bias="one"),
    Case("one_row_many_keys", seqlen_q=1, seqlen_k=3000, nheads_kv=1, group=2),
    Case("many_rows_few_keys", seqlen_q=3000, seqlen_k=3, nheads_kv=1, dlse=True),
    named("varlen_window_alibi"),
    named("paged_varlen"),
    named("everything"),
]


def results(inputs: CaseInputs, engine: Engine, **flags: bool) -> dict[str, np.ndarray]:
    given = {**inputs.arguments, **flags, "backend": engine.backend}
    out, lse = anyattn.attention_forward(**given)
    found = {"out": out, "lse": lse}
    if "block_table" not in given:
        grads = anyattn.attention_backward(inputs.dout, out=out, lse=lse, dlse=inputs.dlse, **given)
        found |= {name: value for name, value in grads._asdict().items() if value is not None}
    return found


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), f"{name} differs"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: Case, engine: Engine) -> None:
    inputs = make_inputs(case)
    engine.use(threads=1)
    want = results(inputs, engine)
    for threads in (2, 3, 5):
        engine.use(threads=threads)
        assert settings.current().num_threads == threads
        assert_same(want, results(inputs, engine))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_identical_from_run_to_run(case: Case, engine: Engine) -> None:
    """Other addresses, the same bits; and deterministic=True is accepted."""
    want = results(make_inputs(case), engine)
    for _ in range(2):
        assert_same(want, results(make_inputs(case), engine, deterministic=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 3, 70])
def test_batch_invariant_results_equal_those_of_each_sequence_alone(
    seqlen_q: int, dtype: str, causal: bool, engine: Engine
) -> None:
    """Each sequence alone, in a batch, in another place of the batch, and packed: the same out and lse."""
    case = Case("batch", batch=3, seqlen_q=seqlen_q, seqlen_k=700, group=4, dtype=dtype, causal=causal)
    given = make_inputs(case).arguments
    q, k, v = given["q"], given["k"], given["v"]
    flags = {"causal": causal, "batch_invariant": True, "backend": engine.backend, "return_lse": True}
    out, lse = anyattn.attention(q, k, v, **flags)
    turned, turned_lse = anyattn.attention(q[::-1], k[::-1], v[::-1], **flags)
    assert turned[::-1].tobytes() == out.tobytes() and turned_lse[::-1].tobytes() == lse.tobytes()
    rows, keys = [seqlen_q * b for b in range(4)], [700 * b for b in range(4)]
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    packed, packed_lse = anyattn.attention_varlen(*flat, rows, keys, **flags)
    assert packed.tobytes() == out.tobytes()
    assert packed_lse.swapaxes(0, 1).reshape(3, seqlen_q, -1).swapaxes(1, 2).tobytes() == lse.tobytes()
    for b in range(3):
        alone, alone_lse = anyattn.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **flags)
        assert alone.tobytes() == out[b].tobytes() and alone_lse.tobytes() == lse[b].tobytes()


def test_batch_invariant_results_do_not_depend_on_longer_sequences(engine: Engine) -> None:
    """Check a short sequence in a batch with a far longer one, with many unused slots."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 2, 4, 32)).astype(np.float32)
    k, v = (rng.standard_normal((2, 4000, 4, 32)).astype(np.float32) for _ in range(2))
    flags = {"batch_invariant": True, "backend": engine.backend}
    both = anyattn.attention(q, k, v, seqused_k=[90, 4000], **flags)
    alone = anyattn.attention(q[:1], k[:1, :90], v[:1, :90], **flags)
    assert alone.tobytes() == both[:1].tobytes()


def test_padded_packed_and_paged_drop_the_same_entries(engine: Engine) -> None:
    """Each sequence's values count its kept keys, so equal sums mean equal bits."""
    n, lengths, size = 50, [50, 20, 37], 16
    ones = np.ones((3, n, 2, 4), np.float32)
    keys = np.zeros((3, n, 2, 2 * n), np.float32)
    keys[:, np.arange(n), :, np.arange(n)] = 1  # value j is the unit vector j: out shows which keys were kept
    flags = {"dropout_p": 0.5, "seed": 77, "backend": engine.backend}
    dense, _ = anyattn.attention_forward(ones, ones, keys, seqused_q=lengths, seqused_k=lengths, **flags)
    starts = np.cumsum([0, *lengths])
    rows = np.concatenate([ones[b, :m] for b, m in enumerate(lengths)])
    values = np.concatenate([keys[b, :m] for b, m in enumerate(lengths)])
    packed, _ = anyattn.attention_forward(rows, rows, values, cu_seqlens_q=starts, cu_seqlens_k=starts, **flags)
    table = np.arange(12).reshape(3, 4)[:, ::-1].copy()
    pages_k, pages_v = np.ones((12, size, 2, 4), np.float32), np.zeros((12, size, 2, 2 * n), np.float32)
    for b in range(3):
        for j in range(n):
            pages_v[table[b, j // size], j % size] = keys[b, j]
    paged, _ = anyattn.attention_forward(
        rows, pages_k, pages_v, cu_seqlens_q=starts, block_table=table, seqused_k=lengths, **flags
    )
    for b, m in enumerate(lengths):
        mine = slice(starts[b], starts[b + 1])
        assert np.array_equal(packed[mine] > 0, dense[b, :m] > 0)
        assert np.array_equal(paged[mine] > 0, dense[b, :m] > 0)
    share = (dense[0, :, :, :50] > 0).mean()
    assert 0.45 < share < 0.55
