"""Parts of a longer sequence: results in the compute dtype, and dropout that counts from the part's start."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn
from anyattn.definition.dtypes import narrow, widen
from anyattn.testing import Case, make_inputs
from harness.backends import Engine
from harness.selection import every_backend

CASE = Case("parts", batch=2, seqlen_q=40, seqlen_k=37, nheads_kv=2, group=2, causal=True)
CUTS = [(0, 5), (5, 21), (21, 37)]


@every_backend(interpreter=True, refusals=True)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_partial_results_round_to_the_results(dtype: str, engine: Engine) -> None:
    case = Case("partial", batch=1, seqlen_q=20, seqlen_k=24, dtype=dtype, bias="b1", causal=True, dlse=True)
    given = dict(make_inputs(case).arguments)
    arrays = [given.pop(name) for name in ("q", "k", "v")]
    flags = {**given, "backend": engine.backend}
    if engine.backend == "vulkan" and dtype != "float32":
        with pytest.raises(anyattn.UnsupportedProblem, match="partial"):
            anyattn.attention_forward(*arrays, **flags, partial=True)
        return
    wide, lse = anyattn.attention_forward(*arrays, **flags, partial=True)
    out, _ = anyattn.attention_forward(*arrays, **flags)
    assert wide.dtype == np.float32
    assert narrow(wide, dtype).tobytes() == out.tobytes()
    dout = np.ones_like(out)
    wide_gradients = anyattn.attention_backward(dout, *arrays, out, lse, **flags, partial=True)
    for got, want in zip(wide_gradients, anyattn.attention_backward(dout, *arrays, out, lse, **flags), strict=True):
        if want is not None:
            eps = (
                float(np.spacing(np.float32(1)))
                if dtype == "float32"
                else {"float16": 2**-10, "bfloat16": 2**-7}[dtype]
            )
            assert got.dtype == np.float32
            wanted = widen(np.asarray(want), dtype, np.float32)
            assert (np.abs(got - wanted) <= eps * np.abs(wanted) + 2e-6).all()


@every_backend()
def test_partial_calls_drop_the_entries_of_one_call(engine: Engine) -> None:
    given = make_inputs(CASE).arguments
    q, k, v = given["q"], given["k"], given["v"]
    flags = {"dropout_p": 0.4, "seed": 11, "softcap": 2.0, "backend": engine.backend}
    if engine.backend in ("triton", "vulkan"):
        with pytest.raises(anyattn.UnsupportedProblem, match="query_start"):
            anyattn.attention_forward(q, k, v, query_start=1, **flags)
        return
    want, want_lse = anyattn.attention_forward(q, k, v, **flags)
    dout = np.asarray(np.random.default_rng(0).standard_normal(want.shape), np.float32)
    wanted = anyattn.attention_backward(dout, q, k, v, want, want_lse, **flags)
    rows = slice(9, 40)
    dq = np.zeros_like(q[:, rows])
    out, lse = np.zeros_like(want[:, rows]), np.full_like(want_lse[..., rows], -np.inf)
    for start, stop in CUTS:
        keys = slice(start, stop)
        part = {**flags, "query_start": 9, "key_start": start}
        out, lse = anyattn.merge(out, lse, *anyattn.attention_forward(q[:, rows], k[:, keys], v[:, keys], **part))
        saved = want[:, rows], want_lse[..., rows]
        dq += anyattn.attention_backward(dout[:, rows], q[:, rows], k[:, keys], v[:, keys], *saved, **part).dq
    np.testing.assert_allclose(out, want[:, rows], rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse[..., rows], rtol=0, atol=2e-6)
    np.testing.assert_allclose(dq, wanted.dq[:, rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["query_start", "key_start"])
@pytest.mark.parametrize("start", [-1, 2**31])
def test_starts_must_be_positions(start: int, name: str) -> None:
    x = np.ones((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match=f"{name} must be from 0"):
        anyattn.attention_forward(x, x, x, **{name: start})


def test_partial_tangents_are_refused() -> None:
    x = np.ones((1, 4, 1, 8), np.float32)
    out, lse = anyattn.attention_forward(x, x, x)
    with pytest.raises(ValueError, match="partial must be False"):
        anyattn.attention_tangent(x, x, x, out, lse, tq=x, partial=True)
