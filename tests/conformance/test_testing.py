"""`anyattn.testing`: right results pass, one wrong number does not, and cases have the features that they name."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import explicit, testing
from anyattn.definition import reference
from anyattn.testing import sampling
from harness.processes import fresh

SMALL = testing.Limits(shortest=20, longest=60, head_dim=24, scores=2**13)
EVERYTHING = testing.Case("everything", seqlen_q=23, seqlen_k=37, dlse=True, **testing.FEATURES["everything"])


@pytest.mark.parametrize("case", [*testing.feature_cases(1, limits=SMALL)], ids=lambda case: f"{case.dtype}-{case}")
def test_right_results_pass(case: testing.Case) -> None:
    assert testing.check(case, backend="numpy") == []


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "dbias", "dsink"])
def test_one_wrong_number_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = "attention_forward" if name in ("out", "lse") else "attention_backward"
    right: Callable[..., Any] = getattr(explicit, function)

    def wrong(*arguments: Any, **named: Any) -> Any:
        results = right(*arguments, **named)
        array = results[0 if name == "out" else 1] if function == "attention_forward" else getattr(results, name)
        array.flat[array.size // 3] += 0.01
        return results

    monkeypatch.setattr(explicit, function, wrong)
    lines = testing.check(EVERYTHING, backend="numpy")
    assert any(f": {name}: error " in line for line in lines), lines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda out: out.astype(np.float64), "forward: out must be float32 (2, 23, 2, 40), got float64 (2, 23, 2, 40)"),
        (lambda out: out[:, 1:], "forward: out must be float32 (2, 23, 2, 40), got float32 (2, 22, 2, 40)"),
        (np.asfortranarray, "forward: out is not contiguous"),
        (lambda out: None, "forward: out is missing"),
    ],
)
def test_malformed_result_is_reported(change: Any, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = explicit.attention_forward

    def wrong(**named: Any) -> Any:
        out, lse = right(**named)
        return change(out), lse

    monkeypatch.setattr(explicit, "attention_forward", wrong)
    assert testing.check(EVERYTHING, backend="numpy", passes=["forward"]) == [line]


def test_gradient_of_an_absent_input_is_reported() -> None:
    inputs = testing.make_inputs(testing.Case("plain"))
    got = testing.compute(inputs, "backward", "numpy")
    assert testing.malformed(inputs, got) == []
    wrong = {**got, "dbias": got["dq"], "dk": None}
    lines = ["dk is missing", "dbias must be None, because the call has no such input"]
    assert testing.malformed(inputs, wrong) == lines


def test_overwritten_input_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = explicit.attention_forward

    def wrong(**named: Any) -> Any:
        results = right(**named)
        named["k"].base[0] = 0  # before the first key
        return results

    monkeypatch.setattr(explicit, "attention_forward", wrong)
    lines = testing.check(testing.Case("plain"), backend="numpy", passes=["forward"])
    assert lines == ["an input, or memory around it, was written"]


def test_refusal_raises() -> None:
    with pytest.raises(anyattn.UnsupportedProblem):
        testing.check(testing.Case("too wide", seqlen_q=3, seqlen_k=3, head_dim=600), backend="triton")


def test_seed_determines_the_case() -> None:
    drawn = [testing.random_case(random.Random(seed)) for seed in range(200)]
    assert drawn == [testing.random_case(random.Random(seed)) for seed in range(200)]
    first, second = (testing.make_inputs(EVERYTHING).bytes() for _ in range(2))
    assert first == second
    assert first != testing.make_inputs(replace(EVERYTHING, seed=1)).bytes()


def test_limits_bound_the_sizes() -> None:
    limits = testing.Limits(smallest=1, shortest=5, longest=300, head_dim=64, scores=2**12)
    for case in (testing.random_case(random.Random(seed), limits) for seed in range(2000)):
        assert case.batch >= 1 and max(case.head_dim, case.head_dim_v) <= 64
        assert max(case.seqlen_q, case.seqlen_k) <= 300
        assert case.batch * case.nheads * case.seqlen_q * case.seqlen_k <= 2**12


HIDING = ("causal", "causal, top left", "window", "causal window", "chunk", "mask", "everything")


def test_features_are_present_and_mask_some_keys() -> None:
    for case in testing.feature_cases(2, ["float32"]):
        problem, arrays = testing.make_inputs(case).describe()
        assert bool(problem.variant.features) == (case.name != "plain")
        scores = np.concatenate([head.s.ravel() for head in reference.heads(problem, arrays)])
        visible = np.isfinite(scores).mean()
        assert visible > 0, case
        assert visible < 1 or case.name not in HIDING, case


def test_bfloat16_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert not testing.has_dtype("bfloat16") and testing.has_dtype("float16")


def test_numpy_is_the_only_requirement() -> None:
    result = fresh(
        "import sys; sys.modules |= dict.fromkeys(('torch', 'triton', 'ml_dtypes'))\n"
        "from anyattn import testing\n"
        "assert testing.check(testing.Case('plain'), backend='numpy') == []\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# Parts of large problems


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem counts as large, and is computed a few rows at a time."""
    monkeypatch.setattr(sampling, "ALL_SCORES", 0)
    monkeypatch.setattr(sampling, "ROWS", 6)
    monkeypatch.setattr(sampling, "SCORES", 200)


DENSE = testing.Case(
    "dense", batch=5, seqlen_q=70, seqlen_k=90, nheads_kv=3, group=2, causal=True, window=(50, None), softcap=5.0,
    bias="b1", mask="h1", alibi="bh", sink=True, dropout_p=0.2, dlse=True,
)  # fmt: skip
PACKED = testing.Case("packed", batch=4, seqlen_q=70, seqlen_k=90, nheads_kv=2, group=2, lengths="varlen")


@pytest.mark.parametrize("case", [DENSE, PACKED, replace(DENSE, dtype="float16")], ids=str)
@pytest.mark.parametrize("name", testing.PASSES)
@pytest.mark.usefixtures("parts")
def test_sampled_entries_equal_those_of_the_whole_result(case: testing.Case, name: str) -> None:
    inputs = testing.make_inputs(case)
    saved = (inputs.dout, inputs.dlse) if name == "backward" else ()
    found, whole = testing.expected_results(inputs.arguments, *saved), testing.expected(inputs, name)
    assert found.keys() == whole.keys() - {"dbias", "dsink"}
    for result, want in found.items():
        assert want.known is not None and 0 < want.known.mean() < 1
        assert np.allclose(want.value[want.known], whole[result].value[want.known], rtol=1e-12, atol=1e-12)
        assert 0 < want.budget <= 1.001 * whole[result].budget
    right = testing.compute(inputs, name, "numpy")
    assert testing.compare(found, right) == []


@pytest.mark.parametrize("result", ["out", "lse", "dq", "dk", "dv"])
@pytest.mark.usefixtures("parts")
def test_wrong_sampled_entry_is_reported(result: str) -> None:
    name = "forward" if result in ("out", "lse") else "backward"
    inputs = testing.make_inputs(DENSE)
    want = testing.expected_results(inputs.arguments, *((inputs.dout, inputs.dlse) if name == "backward" else ()))
    got = {key: x for key, x in testing.compute(inputs, name, "numpy").items() if key in want}
    known = want[result].known
    wrong, ignored = got[result].copy(), got[result].copy()
    wrong[tuple(index[-1] for index in np.nonzero(known))] += 0.01
    ignored[~known] = np.nan
    assert [line.split(":")[0] for line in testing.compare(want, {**got, result: wrong})] == [result]
    assert testing.compare(want, {**got, result: ignored}) == []


def test_a_small_problem_is_compared_whole() -> None:
    inputs = testing.make_inputs(DENSE)
    want = testing.expected_results(inputs.arguments)
    assert all(x.known is None for x in want.values())


def test_torch_tensors_are_accepted() -> None:
    torch = pytest.importorskip("torch")
    inputs = testing.make_inputs(testing.Case("plain", dtype="bfloat16"))
    bits = {name: torch.from_numpy(inputs.arguments[name].view(np.int16).copy()) for name in ("q", "k", "v")}
    tensors = {name: x.view(torch.bfloat16) for name, x in bits.items()}
    want, found = testing.expected(inputs, "forward"), testing.expected_results(tensors)
    assert all(np.array_equal(want[name].value, found[name].value) for name in want)
    got = dict(zip(("out", "lse"), map(testing.to_numpy, anyattn.attention_forward(**tensors)), strict=True))
    assert testing.compare(found, got) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_missing_result_exceeds_the_budget_of_a_long_sum(dtype: str) -> None:
    """Errors of independent roundings to 16 bits grow like the root of a sum's length, and so do their budgets."""
    case = testing.Case("long", batch=1, nheads_kv=1, seqlen_q=2000, seqlen_k=2000, dtype=dtype, causal=True)
    inputs = testing.make_inputs(case)
    for name in testing.PASSES:
        gradients = (inputs.dout, inputs.dlse) if name == "backward" else ()
        for want in testing.expected_results(inputs.arguments, *gradients, random=True).values():
            assert want.budget < 0.1 * np.abs(want.value).max()
