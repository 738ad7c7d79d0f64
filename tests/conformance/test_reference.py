"""The reference against torch's float64 autograd over every case, finite differences, and torch's own SDPA."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anyattn.definition import reference
from anyattn.definition.passes import BACKWARD
from anyattn.testing import Case, CaseInputs, make_inputs
from harness.cases import ALL, named
from harness.oracle import attention

torch = pytest.importorskip("torch")


def reference_of(inputs: CaseInputs) -> dict[str, np.ndarray | None]:
    problem, arrays = inputs.describe(BACKWARD)
    out, lse = reference.forward(problem, arrays)
    return {"out": out, "lse": lse, **vars(reference.backward(problem, arrays, inputs.dout64, inputs.dlse64))}


@pytest.mark.parametrize("case", ALL, ids=str)
def test_reference_equals_autograd(case: Case) -> None:
    inputs = make_inputs(case)
    expected, got = attention(inputs), reference_of(inputs)
    for name, want in expected.items():
        value = got[name]
        if want is None:
            assert value is None, name
            continue
        assert value is not None, name
        largest = np.abs(want[np.isfinite(want)]).max(initial=1.0)
        np.testing.assert_allclose(value.reshape(want.shape), want, rtol=0, atol=1e-11 * largest, err_msg=name)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink"])
def test_gradients_equal_finite_differences(name: str) -> None:
    """Differentiate sum(out * dout) + sum(lse * dlse) in random directions."""
    sizes = {"seqlen_q": 9, "seqlen_k": 12, "group": 2, "head_dim": 5, "head_dim_v": 3, "dtype": "float64"}
    case = Case("differences", **sizes, bias="h1", sink=True, softcap=1.5, causal=True, dropout_p=0.3, dlse=True)
    inputs = make_inputs(case)
    gradient = reference_of(inputs)[f"d{name}"]
    array = inputs.arguments[name]
    assert gradient is not None
    rng = np.random.default_rng(1)
    for _ in range(5):
        direction = rng.standard_normal(array.shape)
        slope = (_loss(inputs, name, array + 1e-5 * direction) - _loss(inputs, name, array - 1e-5 * direction)) / 2e-5
        along = (np.where(np.isfinite(array), gradient, 0) * direction).sum()
        assert slope == pytest.approx(along, rel=1e-6, abs=1e-6)


def _loss(inputs: CaseInputs, name: str, value: np.ndarray) -> float:
    changed = replace(inputs, arguments={**inputs.arguments, name: value})
    problem, arrays = changed.describe()
    out, lse = reference.forward(problem, arrays)
    assert inputs.dlse64 is not None
    seen = np.isfinite(lse)
    return float((out * inputs.dout64).sum() + (lse[seen] * inputs.dlse64[seen]).sum())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(17, 17), (9, 23)])
def test_reference_equals_sdpa(causal: bool, seqlen_q: int, seqlen_k: int) -> None:
    """Compare with torch's is_causal, aligned to the top left. torch reads unused memory, so NaN becomes 0."""
    case = Case("sdpa", seqlen_q=seqlen_q, seqlen_k=seqlen_k, group=3, dtype="float64", causal=causal)
    case = replace(case, alignment="top-left")
    inputs = make_inputs(case)
    q, k, v = (
        torch.from_numpy(np.nan_to_num(inputs.arguments[name].swapaxes(1, 2))).requires_grad_() for name in "qkv"
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    out.backward(torch.from_numpy(inputs.dout.swapaxes(1, 2).copy()))
    got = reference_of(inputs)
    for name, want in {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}.items():
        np.testing.assert_allclose(got[name].swapaxes(1, 2), want.numpy(), rtol=0, atol=1e-12, err_msg=name)


def test_queries_without_keys_give_the_results_worked_out_by_hand() -> None:
    """Worked by hand: 2 rows, no keys, sink 0.5: out 0, lse 0.5, and dsink is the sum of dlse."""
    inputs = make_inputs(
        Case("no_keys", batch=1, seqlen_q=2, seqlen_k=0, nheads_kv=1, sink=True, dlse=True, dtype="float64")
    )
    inputs.arguments["sink"] = np.array([0.5])
    got = reference_of(inputs)
    assert (got["out"] == 0).all() and (got["lse"] == 0.5).all() and (got["dq"] == 0).all()
    assert inputs.dlse is not None
    assert got["dsink"] == pytest.approx(inputs.dlse.sum())


def test_unused_memory_changes_nothing() -> None:
    """Compute a case with NaN, 1e3 and infinity in all memory that no query attends to."""
    case = named("paged_varlen")
    results = []
    for stale in (np.nan, 1e3, np.inf):
        inputs = make_inputs(case)
        for name in ("k", "v"):
            array = inputs.arguments[name]
            array[np.isnan(array)] = stale
        results.append(reference_of(inputs))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert all(np.array_equal(results[0][name], other[name]) for other in results[1:]), name
