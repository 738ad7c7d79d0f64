"""Scores of any finite size: P is right wherever the products are, and adds up to 1, forward and backward.

On the CPU and in NumPy the size of a score alone costs no digits. Other backends keep the rule of accuracy.py, whose
budget grows with the score.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition.accuracy import Expected
from anyattn.definition.dtypes import DTYPES
from anyattn.testing import Case, CaseInputs, make_inputs, numpy_dtype
from harness.backends import Engine
from harness.checks import run, wrong
from harness.selection import every_backend

HOST = ("numpy", "cpu")
SIZES = (1e3, 3e5, 1e9, 1e36)
LARGEST = {"float16": 1e8}  # scores of larger queries and keys would not be finite
SCALE = 0.125
# |s| up to which exp(s - lse) is used as it is, with the rounding of lse
TRUSTED = 128.0

CASES = [
    Case("dense", seqlen_q=70, seqlen_k=210, head_dim=64, head_dim_v=40, dlse=True),
    Case("causal", seqlen_q=130, seqlen_k=210, head_dim=64, group=2, causal=True),
    Case("window", batch=1, seqlen_q=130, seqlen_k=210, head_dim=64, window=(50, 20), scale=-SCALE),
    Case("mask", batch=1, seqlen_q=40, seqlen_k=130, head_dim=64, mask="full"),
    Case("bias", batch=1, seqlen_q=70, seqlen_k=210, head_dim=64, bias="full", causal=True),
    Case("broadcast bias", batch=1, seqlen_q=70, seqlen_k=130, head_dim=64, bias="row"),
    Case("alibi", batch=1, seqlen_q=40, seqlen_k=130, head_dim=64, alibi="h", causal=True),
    Case("sink", batch=1, seqlen_q=70, seqlen_k=130, head_dim=64, sink=True),
    Case("dropout", batch=1, seqlen_q=70, seqlen_k=130, head_dim=64, dropout_p=0.3),
    Case("varlen", seqlen_q=70, seqlen_k=210, head_dim=64, lengths="varlen", causal=True),
    Case("lists", batch=1, seqlen_q=70, seqlen_k=130, head_dim=64, group=2, kv_indices="heads", sink=True, dlse=True),
    Case("wide lists", batch=1, seqlen_q=9, seqlen_k=130, head_dim=64, group=20, kv_indices="shared", bias="full"),
    Case("decode", batch=1, seqlen_q=1, seqlen_k=1300, head_dim=64, group=4),
    Case("few", batch=1, seqlen_q=7, seqlen_k=1300, head_dim=64, causal=True),
    Case("split rows", batch=1, seqlen_q=33, seqlen_k=1100, head_dim=64, sink=True),
]
KINDS = ("equal", "close", "one")
PROBLEMS = 2 * len(SIZES) * len(KINDS)  # of a test, whose arrays its engines share


@lru_cache(PROBLEMS)
def exact(case: Case, size: float, kind: str) -> CaseInputs:
    """Return inputs whose scores are about `size`, and exact: multiples of a step, in any order of summation.

    kind: all keys of a row are equal; a few steps apart; or one has this score, and the others a few steps.
    """
    inputs, rng = make_inputs(case), np.random.default_rng(1)
    q, k = (np.zeros(inputs.arguments[name].shape) for name in "qk")
    half = 2.0 ** np.floor(np.log2(abs(size) / SCALE / 15) / 2)
    step = 2.0 ** np.ceil(np.log2(max(0.25, abs(size) * 2.0**-18)))
    q[..., 0], k[..., 0] = 3 * half * np.sign(size), 5 * half
    q[..., 1:] = rng.integers(-1, 2, q[..., 1:].shape)
    k[..., 1:] = rng.integers(-1, 2, k[..., 1:].shape) * step / SCALE
    if kind == "equal":
        k[..., 1:] = 0
    if kind == "one":
        at = (slice(None),) * (k.ndim - 3)
        k[..., 0] = 0
        k[(*at, 5, slice(None), 0)] = 5 * half
    given, dtype = inputs.arguments, numpy_dtype(case.dtype)
    given["q"], given["k"] = q.astype(dtype), k.astype(dtype)
    if "bias" in given:
        given["bias"] = (rng.integers(-3, 4, given["bias"].shape) * step).astype(dtype)
    if "alibi_slopes" in given:
        given["alibi_slopes"][...] = step
    if "sink" in given:
        given["sink"][...] = 15 * half * half * SCALE * np.sign(size)
    return inputs


@lru_cache(2 * PROBLEMS)
def expected(case: Case, size: float, kind: str, direction: str) -> dict[str, Expected]:
    return testing.expected(exact(case, size, kind), direction)


def too_far(want: Expected, got: np.ndarray, name: str, dtype: str) -> str:
    """Return "" or the error, which must not grow with the score: only sums and results are rounded."""
    compute = DTYPES[dtype].compute
    dtype = compute if name == "lse" else dtype
    c = 64.0 if dtype == "float64" else {"lse": 4.0, "out": 8.0}.get(name, 16.0)
    rounding = c * DTYPES[dtype].eps
    if name not in ("out", "lse"):
        rounding += TRUSTED / 4 * DTYPES[compute].eps  # half a unit in the last place of an lse just below
    allowed = rounding * float(want.magnitude.max(initial=0.0)) + DTYPES[dtype].smallest
    error = want.error(got)
    return "" if error <= allowed else f"{name}: error {error:.3g} > {allowed:.3g}"


@every_backend(only=HOST)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16", "float64"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_large_scores_lose_no_accuracy(case: Case, dtype: str, engine: Engine) -> None:
    case = replace(case, dtype=dtype, scale=case.scale or SCALE)
    lines = []
    for size in (sign * size for size in SIZES for sign in (1, -1) if size <= LARGEST.get(dtype, np.inf)):
        for kind in KINDS:
            for direction in ("forward", "backward"):
                got = run(exact(case, size, kind), direction, engine)
                for name, want in expected(case, size, kind, direction).items():
                    line = too_far(want, got[name], name, dtype)
                    lines += [f"{kind} {size:g} {line}"] if line else []
    assert not lines, lines


@every_backend(only=HOST)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("case", [CASES[1], *CASES[-3:]], ids=str)
def test_probabilities_add_up_to_one(case: Case, dtype: str, engine: Engine) -> None:
    """The products are rounded here, so P is one of many: but with dout of ones, dv adds up to the queries."""
    inputs = make_inputs(replace(case, dtype=dtype, sink=False))
    given, dtype_of = inputs.arguments, inputs.dout.dtype
    inputs.dout[...] = 1
    queries = inputs.dout.shape[1] * case.group
    rng = np.random.default_rng(2)
    for size in SIZES:
        for name in "qk":
            given[name] = (rng.standard_normal(given[name].shape) * (size / SCALE / 8) ** 0.5).astype(dtype_of)
        results = run(inputs, "forward", engine) | run(inputs, "backward", engine)
        assert all(np.isfinite(x.astype(np.float64)).all() for x in results.values() if x is not None), size
        assert (np.abs(results["out"]) <= np.abs(given["v"]).max()).all(), size
        total = results["dv"].astype(np.float64).sum(axis=1)
        np.testing.assert_allclose(total, queries, rtol=16 * DTYPES[dtype].eps, err_msg=f"{size:g}")


@every_backend(only=HOST)
@pytest.mark.parametrize("size", [1e3, -1e4, 1e5])
def test_gradients_of_splits_of_the_keys_add_up(size: float, engine: Engine) -> None:
    """Use the lse of all keys, as ring attention does: P of a split sums to less than 1."""
    case = replace(CASES[0], dtype="float32", dlse=False)
    inputs = exact(case, size, "close")
    given = inputs.arguments | {"backend": engine.backend}
    out, lse = anyattn.attention_forward(**given)
    dk, dv, dq = [], [], np.zeros(given["q"].shape)
    for keys in (slice(0, 90), slice(90, None)):
        part = given | {"k": given["k"][:, keys], "v": given["v"][:, keys]}
        got = anyattn.attention_backward(inputs.dout, out=out, lse=lse, **part)
        dk.append(got.dk)
        dv.append(got.dv)
        dq += got.dq
    parts = {"dq": dq, "dk": np.concatenate(dk, axis=1), "dv": np.concatenate(dv, axis=1)}
    for name, x in parts.items():
        want = expected(case, size, "close", "backward")[name]
        rounding = DTYPES["float32"].eps * (16 + 2 * abs(size))
        assert want.error(x) <= rounding * want.magnitude.max(), name


@every_backend(interpreter=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"softcap": 1e5}, {"sink": True}, {"bias": "full"}, {"seqlen_q": 1}], ids=str)
def test_error_stays_within_the_budget(options: dict[str, object], dtype: str, engine: Engine) -> None:
    """Every backend, where both the products and the scores are rounded: the budget grows with the score."""
    case = Case("large", batch=1, seqlen_q=20, seqlen_k=40, causal=True, dtype=dtype)
    inputs = make_inputs(replace(case, **options))  # type: ignore[arg-type]
    for size in (1e3, 1e4, 1e5):
        rng = np.random.default_rng(3)
        for name in ("q", "k", "bias"):
            if name not in inputs.arguments:
                continue
            factor = size if name == "bias" else size**0.5
            values = rng.standard_normal(inputs.arguments[name].shape) * factor
            inputs.arguments[name] = values.astype(inputs.arguments[name].dtype)
        lines = [wrong(inputs, direction, engine) for direction in ("forward", "backward")]
        assert lines == [[], []], f"{size:g}"


@every_backend(only=HOST)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("rows", [1, 20])
def test_scores_that_overflow_in_log2_units_mask_their_keys(rows: int, dtype: str, engine: Engine) -> None:
    """They are below the lowest score, see dtypes.py; a score of the same size above zero is a score."""
    size, kind = (1.2e154, "float64") if dtype == "float64" else (1.7e19, "float32")
    q, k, v = (np.full((1, n, 1, 1), x, numpy_dtype(dtype)) for n, x in ((rows, -size), (30, size), (30, 1.0)))
    arguments = {"scale": 1.0, "backend": engine.backend}
    out, lse = anyattn.attention_forward(q, k, v, **arguments)
    gradients = anyattn.attention_backward(out + 1, q, k, v, out, lse, **arguments)
    assert not out.any() and np.isneginf(lse).all() and not any(x.any() for x in gradients[:3])
    out, lse = anyattn.attention_forward(-q, k, v, **arguments)
    gradients = anyattn.attention_backward(out, -q, k, v, out, lse, **arguments)
    assert (out == 1).all() and np.isfinite(lse).all() and lse.dtype == kind
    np.testing.assert_allclose(gradients.dv.astype(np.float64), rows / 30, rtol=8 * DTYPES[dtype].eps)
