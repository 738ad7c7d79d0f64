"""attention_weights, feature by feature, against attention whose values are the identity: its output is the weights."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition import reference
from anyattn.definition.accuracy import Expected
from anyattn.frameworks import scores
from anyattn.testing import Case, CaseInputs, make_inputs
from harness import oracle
from harness.cases import SMALL, named

DENSE = [case for case in SMALL if not (case.packed or case.paged or case.stored) and case.seqlen_k < 600]
KINDS = ("numpy", "torch")


@lru_cache(maxsize=2)
def inputs_of(case: Case) -> CaseInputs:
    """Return the arrays of a case without dropout, with the identity as values."""
    width = max(1, case.seqlen_k)
    inputs = make_inputs(replace(case, head_dim_v=width, dropout_p=0.0))
    v = inputs.arguments["v"]
    inputs.arguments["v"] = np.broadcast_to(np.eye(case.seqlen_k, width, dtype=v.dtype)[:, None], v.shape)
    return inputs


def arguments_of(inputs: CaseInputs) -> dict[str, Any]:
    """Return the arguments of attention_weights but for lse."""
    given = dict(inputs.arguments)
    for name in ("v", "dropout_p"):
        del given[name]
    return given


def expected(inputs: CaseInputs) -> Expected:
    """Return the weights (batch, seqlen_q, nheads, seqlen_k) in float64, with their error budget.

    It is the budget of an output, and because P = exp(s - lse), that of lse as a relative error.
    """
    want, keys = testing.expected(inputs), inputs.case.seqlen_k
    out, largest = want["out"], want["out"].magnitude.max(initial=0.0)
    value, magnitude = out.value[..., :keys], out.magnitude[..., :keys]
    return replace(out, value=value, magnitude=magnitude, budget=out.budget + want["lse"].budget * largest)


def to_torch(x: Any) -> Any:
    import torch

    if isinstance(x, list):
        return torch.tensor(x, dtype=torch.int32)
    if not isinstance(x, np.ndarray):
        return x
    x = x.copy(order="C")  # torch has no negative strides
    return (
        torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)
    )


def weights(kind: str, given: dict[str, Any], lse: np.ndarray, **queries: Any) -> np.ndarray:
    """Call attention_weights on arrays of this kind; return a NumPy array, bfloat16 as its bits."""
    if kind == "numpy":
        return np.asarray(anyattn.attention_weights(lse=lse, **given, **queries))
    found = anyattn.attention_weights(lse=to_torch(lse), **{name: to_torch(x) for name, x in given.items()}, **queries)
    return np.asarray(testing.to_numpy(found))


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_reference_equals_oracle(case: Case) -> None:
    inputs = inputs_of(case)
    want = oracle.attention(inputs)["out"]
    assert want is not None
    got = reference.weights(*inputs.describe())
    np.testing.assert_allclose(got, want.swapaxes(1, 2)[..., : case.seqlen_k], rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_weights_equal_reference(case: Case, kind: str) -> None:
    inputs = inputs_of(case)
    before, want = inputs.bytes(), expected(inputs)
    _, lse = anyattn.attention_forward(**inputs.arguments)
    got = weights(kind, arguments_of(inputs), lse)
    assert inputs.bytes() == before, "an input, or memory around it, was written"
    assert got.dtype == inputs.arguments["q"].dtype or got.dtype == np.uint16
    assert got.flags.c_contiguous
    error = want.error(got.swapaxes(1, 2))
    assert error <= want.budget


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["everything", "leftpad_seqused", "chunk_window", "bias_per_row", "any_layout_f64"])
def test_results_do_not_depend_on_the_tiles(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(named(case))
    monkeypatch.setattr(scores, "TILE_KEYS", 19)
    monkeypatch.setattr(scores, "TILE_ENTRIES", 20 * inputs.case.batch * inputs.case.nheads * 19)
    _, lse = anyattn.attention_forward(**inputs.arguments)
    want = expected(inputs)
    assert want.error(weights(kind, arguments_of(inputs), lse).swapaxes(1, 2)) <= want.budget


QUERIES: dict[str, Any] = {
    "last": [-1],
    "twice_and_out_of_order": [4, 0, -1, 4],
    "none": [],
    "array": np.array([3, 1], np.int32),
    "unsigned": np.array([1, 2], np.uint8),
    "slice": slice(2, -1),
    "slice_with_a_step": slice(1, None, 3),
    "slice_beyond_the_end": slice(5, 10**9),
    "empty_slice": slice(3, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("case", ["everything", "leftpad_seqused", "bias_of_rank_one", "decode_f16"])
def test_selected_queries_have_the_weights_of_the_whole_call(case: str, name: str, kind: str) -> None:
    """Everything that belongs to a query is chosen with it: its position, its bias, its mask, its lse."""
    inputs = inputs_of(replace(named(case), seqlen_q=7, seqlen_k=40))
    given, queries = arguments_of(inputs), QUERIES[name]
    _, lse = anyattn.attention_forward(**inputs.arguments)
    every = weights(kind, given, lse)
    want = every[:, :, queries if isinstance(queries, slice) else np.asarray(queries, np.int64)]
    got = weights(kind, given, lse, queries=queries)
    assert got.shape == want.shape
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_reproduce_the_output(kind: str) -> None:
    """A query without keys has zeros; without a sink the weights of the others add up to 1."""
    inputs = make_inputs(named("rows_without_keys"))
    given = {name: x for name, x in inputs.arguments.items() if name not in ("v", "dropout_p")}
    out, lse = anyattn.attention_forward(**inputs.arguments)
    got = weights(kind, given, lse)
    sums = np.where(np.isneginf(lse), 0.0, 1.0)
    assert (sums == 0).any() and (sums == 1).any()
    np.testing.assert_allclose(got.sum(axis=-1), sums, rtol=0, atol=1e-5)
    group = inputs.case.group
    v = np.nan_to_num(inputs.arguments["v"]).repeat(group, axis=2)
    np.testing.assert_allclose(np.einsum("bhij,bjhd->bihd", got, v), out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lse_of_merge_gives_the_weights_among_all_keys(kind: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 9, 4, 8)) for _ in range(3))
    halves = [anyattn.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 4), slice(4, None))]
    _, lse = anyattn.merge(*halves[0], *halves[1])
    parts = [weights(kind, {"q": q, "k": k[:, part]}, lse) for part in (slice(0, 4), slice(4, None))]
    want = weights(kind, {"q": q, "k": k}, anyattn.attention(q, k, v, return_lse=True)[1])
    np.testing.assert_allclose(np.concatenate(parts, axis=-1), want, rtol=1e-12, atol=1e-14)


def test_memory_is_the_result_and_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    entries, n = 2**16, 1024
    monkeypatch.setattr(scores, "TILE_ENTRIES", entries)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, n, 2, 16), np.float32) for _ in range(2))
    bias = np.zeros((2, n, n), np.float32)
    _, lse = anyattn.attention(q, k, k, bias=bias, causal=True, return_lse=True)
    tracemalloc.start()
    try:
        result = anyattn.attention_weights(q, k, lse, bias=bias, causal=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tiles = (peak - result.nbytes) / (4 * entries)
    assert tiles < 8, "of a result of 32 tiles"


X = np.ones((2, 5, 4, 8), np.float32)
LSE = np.zeros((2, 4, 5), np.float32)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lse_none": ({"lse": None}, TypeError, r"lse must be what attention\(\.\.\., return_lse=True\) returned"),
    "lse_shape": ({"lse": LSE.swapaxes(1, 2)}, ValueError, r"lse must have shape \(batch, nheads, seqlen_q\)"),
    "lse_dtype": ({"lse": LSE.astype(np.float64)}, TypeError, "lse must have dtype float32"),
    "packed": ({"q": X[0], "k": X[0], "lse": LSE[0]}, ValueError, r"q must have 4 dimensions \(batch, seqlen_q"),
    "head_dim": ({"k": X[..., :4]}, ValueError, "q and k must have one head_dim"),
    "bias": ({"bias": np.zeros((5, 4), np.float32)}, ValueError, "bias must broadcast"),
    "sink": ({"sink": np.zeros(3, np.float32)}, ValueError, "sink must have shape"),
    "seqused_k": ({"seqused_k": np.array([5, 6])}, ValueError, r"seqused_k\[1\] must be .*, got 6"),
    "window": ({"window": (-1, 0)}, ValueError, "window must hold integers >= 0"),
    "query": ({"queries": [5]}, ValueError, "queries must be indices from -5 to 4, got 5"),
    "negative_query": ({"queries": [0, -6]}, ValueError, "queries must be indices from -5 to 4, got -6"),
    "one_query": ({"queries": 3}, TypeError, r"queries must be None, a slice or a 1-D .* Pass \[i\] for one query"),
    "queries_of_two_dimensions": ({"queries": [[1]]}, TypeError, "queries must be None, a slice or a 1-D"),
    "boolean_queries": ({"queries": np.ones(5, bool)}, TypeError, "got bool of shape"),
    "float_queries": ({"queries": [1.0]}, TypeError, "queries must be None, a slice or a 1-D"),
    "backward_slice": ({"queries": slice(None, None, -1)}, ValueError, "slice with a positive step"),
    "varlen": ({"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q"),
    "dropout": ({"dropout_p": 0.1}, TypeError, "dropout_p"),
    "backend": ({"backend": "cpu"}, TypeError, "backend"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_by_name(name: str, kind: str) -> None:
    changes, error, message = WRONG[name]
    given: dict[str, Any] = {"q": X, "k": X, "lse": LSE, **changes}
    if kind == "torch":
        given = {key: x if key == "queries" else to_torch(x) for key, x in given.items()}
    with pytest.raises(error, match=message):
        anyattn.attention_weights(**given)


def test_arrays_of_two_frameworks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"k must be a NumPy array like q"):
        anyattn.attention_weights(X, to_torch(X), LSE)
    with pytest.raises(TypeError, match=r"lse must be a torch\.Tensor like q"):
        anyattn.attention_weights(to_torch(X), to_torch(X), LSE)
