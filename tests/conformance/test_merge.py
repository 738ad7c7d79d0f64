"""merge: the exact attention over the union of disjoint key sets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition import dtypes
from anyattn.testing import Case, make_inputs
from anyattn.testing.cases import DTYPES
from harness.backends import Engine
from harness.selection import every_backend

pytestmark = every_backend()


def parts(case: Case, splits: list[int], engine: Engine) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (out, lse) over each run of keys, with positions in the whole sequence by a given offset."""
    given = make_inputs(case).arguments
    q, k, v = given["q"], given["k"], given["v"]
    edges = [0, *splits, case.seqlen_k]
    results = []
    for start, stop in pairwise(edges):
        flags = {"offset": case.seqlen_k - case.seqlen_q - start, "causal": case.causal, "backend": engine.backend}
        results.append(anyattn.attention(q, k[:, start:stop], v[:, start:stop], return_lse=True, **flags))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [[50], [0], [111], [1, 2, 64]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_merge_equals_attention_over_the_union_of_keys(
    causal: bool, splits: list[int], dtype: str, engine: Engine
) -> None:
    case = Case("union", seqlen_q=70, causal=causal, dtype=dtype, group=2)
    want = testing.expected(make_inputs(case))
    pieces = parts(case, splits, engine)
    out, lse = pieces[0]
    for other in pieces[1:]:
        out, lse = anyattn.merge(out, lse, *other)
    rounding = len(splits) * dtypes.DTYPES[dtype].eps * np.abs(want["out"].value).max()  # each merge rounds once more
    assert want["out"].error(out) <= want["out"].budget + rounding
    assert want["lse"].error(lse) <= want["lse"].budget


def test_queries_without_keys_merge_to_zeros(engine: Engine) -> None:
    """0 and -inf, without a NaN or a warning."""
    pieces = parts(Case("none", seqlen_q=200, causal=True), [50], engine)
    with np.errstate(all="raise"):
        out, lse = anyattn.merge(*pieces[0], *pieces[1])
    assert (out[:, :89] == 0).all() and np.isneginf(lse[..., :89]).all()
    assert np.isfinite(lse[..., 89:]).all()


def test_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1, 5, 2, 3)) for _ in range(2))
    lse_a, lse_b = rng.standard_normal((1, 2, 5)) * 100, rng.standard_normal((1, 2, 5)) * 100
    one, two = anyattn.merge(a, lse_a, b, lse_b), anyattn.merge(b, lse_b, a, lse_a)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-14)


def test_packed_results_are_merged(engine: Engine) -> None:
    """out (total_q, nheads, head_dim_v) with lse (nheads, total_q)."""
    x = np.random.default_rng(0).standard_normal((12, 2, 8)).astype(np.float32)
    whole = anyattn.attention_varlen(x, x, x, [0, 5, 12], [0, 5, 12], return_lse=True, backend=engine.backend)
    halves = [
        anyattn.attention_varlen(
            x, x, x, [0, 5, 12], [0, 5, 12], seqused_k=used, leftpad_k=pad, return_lse=True, backend=engine.backend
        )
        for used, pad in (([2, 3], [0, 0]), ([5, 7], [2, 3]))
    ]
    out, lse = anyattn.merge(*halves[0], *halves[1])
    np.testing.assert_allclose(out, whole[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(lse, whole[1], rtol=0, atol=1e-6)
