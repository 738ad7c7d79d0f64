"""Few query rows and many keys, as in decoding: the native engine packs heads, cuts keys and adds up parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import anyattn
from anyattn.testing import Case, make_inputs
from anyattn.testing.cases import DTYPES
from harness.backends import Engine
from harness.checks import refused, wrong
from harness.selection import every_backend

pytestmark = every_backend()

LONG = Case("long", batch=1, seqlen_q=1, seqlen_k=1300, nheads_kv=3, group=4, head_dim=64, head_dim_v=64, causal=True)
FEATURES = [
    LONG,
    replace(LONG, name="multi_head", nheads_kv=16, group=1),
    replace(LONG, name="multi_query_many_heads", nheads_kv=1, group=70, head_dim=16, head_dim_v=16),
    replace(LONG, name="three_rows_odd_dims", seqlen_q=3, group=5, head_dim=45, head_dim_v=77),
    replace(LONG, name="sixteen_rows", seqlen_q=16, group=3, head_dim=40, head_dim_v=24, causal=False),
    replace(LONG, name="heads_that_do_not_fit", seqlen_q=20, group=7, nheads_kv=2, head_dim=32, head_dim_v=32),
    replace(LONG, name="a_whole_block", seqlen_q=64, group=2, window=(700, 0)),
    replace(LONG, name="window", seqlen_q=2, batch=3, window=(600, 3), causal=False, lengths="both", sink=True),
    replace(LONG, name="chunk", seqlen_q=9, group=2, chunk=900),
    replace(LONG, name="alibi_sink_softcap", seqlen_q=2, batch=2, alibi="bh", sink=True, softcap=5.0),
    replace(LONG, name="bias_mask", seqlen_q=5, group=6, nheads_kv=2, bias="full", mask="full"),
    replace(LONG, name="bias_dropout", seqlen_q=4, bias="row", dropout_p=0.3),
    replace(LONG, name="dropout", seqlen_q=3, batch=2, dropout_p=0.4, nheads_kv=2),
    replace(LONG, name="paged", seqlen_q=2, batch=3, lengths="paged", page_size=7),
    replace(LONG, name="paged_varlen", seqlen_q=3, batch=3, lengths="paged_varlen", page_size=48),
    replace(LONG, name="varlen", seqlen_q=4, batch=4, lengths="varlen_seqused"),
    replace(LONG, name="huge", content="huge"),
    replace(LONG, name="rising", content="rising", seqlen_q=2),
    replace(LONG, name="falling", content="falling", seqlen_q=2, scale=-0.2),
    replace(LONG, name="heads_first", layout="bhsd", nheads_kv=8, seqlen_q=2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_short_queries_equal_the_reference(case: Case, dtype: str, engine: Engine) -> None:
    inputs = make_inputs(replace(case, dtype=dtype))
    before = inputs.bytes()
    assert not refused(inputs, "forward", engine)
    assert not wrong(inputs, "forward", engine)
    assert inputs.bytes() == before, "an input, or memory around it, was written"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_short_sequence_has_the_same_bits_next_to_a_long_one(dtype: str, engine: Engine) -> None:
    """Prefill and decoding in one call: each sequence has the bits that it has alone."""
    rows, keys = [1, 100, 3, 64, 65, 0, 17], [1500, 700, 2000, 1025, 100, 30, 512]
    cu_q, cu_k = np.cumsum([0, *rows]), np.cumsum([0, *keys])
    inputs = make_inputs(Case("mixed", batch=1, seqlen_q=int(cu_q[-1]), seqlen_k=int(cu_k[-1]), group=2, dtype=dtype))
    q, k, v = (inputs.arguments[name][0] for name in "qkv")
    flags = {"causal": True, "backend": engine.backend, "return_lse": True}
    out, lse = anyattn.attention_varlen(q, k, v, cu_q, cu_k, **flags)
    for b, (m, n) in enumerate(zip(rows, keys, strict=True)):
        mine, theirs = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone, alone_lse = anyattn.attention_varlen(q[mine], k[theirs], v[theirs], [0, m], [0, n], **flags)
        assert alone.tobytes() == out[mine].tobytes() and alone_lse.tobytes() == lse[:, mine].tobytes()
