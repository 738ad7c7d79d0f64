"""The ONNX operator Attention: the node cases that the package onnx ships."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest

from anyattn.compat import onnx as adapter
from anyattn.definition.dtypes import widen

CACHE = ("present_key", "present_value")  # copies, bit for bit


def collect() -> dict[str, Any]:
    """Return the cases by name, without those that expand the node into other operators."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it makes the cases of every operator
        cases = collect_testcases("Attention")
    return {case.name: case for case in cases if not case.name.endswith("_expanded")}


CASES = collect()


def inputs_of(name: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the inputs of a case in the order of the node, and its attributes."""
    import onnx

    (node,), (given, _) = CASES[name].model.graph.node, CASES[name].data_sets[0]
    values = iter(given)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if len(node.output) == 4:
        attributes.setdefault("qk_matmul_output_mode", 0)
    return [next(values) if label else None for label in node.input], attributes


def test_cases_of_the_onnx_package_are_complete() -> None:
    assert len(CASES) == 93
    modes = [inputs_of(name)[1]["qk_matmul_output_mode"] for name, case in CASES.items() if outputs(case) == 4]
    assert Counter(modes) == {0: 3, 1: 2, 2: 7, 3: 6}


def outputs(case: Any) -> int:
    """Return the number of outputs of the case's node."""
    return len(case.model.graph.node[0].output)


@pytest.mark.parametrize("name", sorted(CASES))
def test_node_gives_the_results_of_onnx(name: str) -> None:
    inputs, attributes = inputs_of(name)
    node, (given, expected) = CASES[name].model.graph.node[0], CASES[name].data_sets[0]
    results = adapter.attention(*inputs, **attributes)
    wanted = [(label, result) for label, result in zip(node.output, results, strict=False) if label]
    assert len(wanted) == len(expected)
    # theirs rounds every step to float16 or bfloat16: as many bits as these have
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(given[0].dtype.name, 0.0)
    rtol, atol = max(CASES[name].rtol, 2 * eps), max(CASES[name].atol, 2 * eps)
    for (label, got), want in zip(wanted, expected, strict=True):
        assert got.dtype == want.dtype
        values = widen(got, got.dtype.name), widen(want, want.dtype.name)
        tolerance = {"rtol": 0.0, "atol": 0.0} if label in CACHE else {"rtol": rtol, "atol": atol}
        np.testing.assert_allclose(*values, **tolerance, err_msg=label)


@pytest.mark.parametrize("mode", range(4))
def test_qk_matmul_output_modes_return_the_steps_of_the_operator(mode: int) -> None:
    """Each in float64, with grouped heads, softcap, a float mask, a causal window and keys that are not in use."""
    rng = np.random.default_rng(0)
    Q, K, V = (rng.standard_normal((2, heads, n, 8)).astype(np.float32) for heads, n in ((4, 5), (2, 7), (2, 7)))
    mask, used = rng.standard_normal((4, 5, 6)).astype(np.float32), np.array([6, 3])
    mask[0, :, 1] = -np.inf
    options = {"softcap": 0.7, "scale": 0.9, "is_causal": 1, "left_window_size": 3, "nonpad_kv_seqlen": used}
    *_, got = adapter.attention(Q, K, V, mask, **options, qk_matmul_output_mode=mode)

    products = 0.9 * (Q.astype(np.float64) @ np.repeat(K, 2, axis=1).astype(np.float64).swapaxes(2, 3))
    capped = 0.7 * np.tanh(products / 0.7)
    p, j = np.arange(5)[:, None] + (used - 5)[:, None, None, None], np.arange(7)
    visible = (j <= p) & (p - 3 <= j) & (j < used[:, None, None, None])
    masked = np.where(visible, capped + np.pad(mask, [(0, 0), (0, 0), (0, 1)], constant_values=-np.inf), -np.inf)
    some = np.isfinite(masked).any(axis=-1, keepdims=True)
    exponentials = np.exp(masked - np.where(some, masked.max(axis=-1, keepdims=True), 0.0))
    weights = exponentials / np.where(some, exponentials.sum(axis=-1, keepdims=True), 1.0)
    assert not some.all() and some.any()
    assert got.dtype == np.float32 and got.shape == (2, 4, 5, 7)
    np.testing.assert_allclose(got, (products, capped, masked, weights)[mode], rtol=1e-5, atol=1e-6)


def test_reference_evaluator_passes_the_output_mode() -> None:
    """A node with a fourth output and no mode reaches the adapter with mode 0."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Attention(OpRun):  # type: ignore[misc]
        def _run(self, *inputs: Any, **attributes: Any) -> Any:
            given = {name: value for name, value in attributes.items() if value is not None}
            return adapter.attention(*inputs, **given)[: len(self.onnx_node.output)]

    case = CASES["test_attention_4d_with_qk_matmul"]
    given, expected = case.data_sets[0]
    results = ReferenceEvaluator(case.model, new_ops=[Attention]).run(None, dict(zip("QKV", given, strict=True)))
    assert len(results) == len(expected) == 2
    np.testing.assert_allclose(results[1], expected[1], rtol=1e-5)


def test_scores_are_computed_only_if_they_are_an_output() -> None:
    x = np.ones((1, 2, 5, 8), np.float32)
    assert len(adapter.attention(x, x, x)) == 3


def test_softmax_precision_may_be_double() -> None:
    q = np.random.default_rng(0).standard_normal((1, 2, 5, 8)).astype(np.float16)
    exact = adapter.attention(*[q.astype(np.float64)] * 3)[0]
    got = adapter.attention(q, q, q, softmax_precision=adapter.DOUBLE)[0]
    assert got.dtype == np.float16
    assert np.array_equal(got, exact.astype(np.float16))


def test_double_precision_accepts_a_mask_in_the_dtype_of_the_inputs() -> None:
    q, mask = np.ones((1, 2, 5, 8), np.float32), np.zeros((5, 5), np.float32)
    assert np.array_equal(adapter.attention(q, q, q, mask, softmax_precision=adapter.DOUBLE)[0], q)


def test_integer_mask_is_added_to_the_scores() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 5, 8)).astype(np.float32)
    mask = rng.integers(-4, 4, (5, 5))
    added = adapter.attention(x, x, x, mask.astype(np.float32))[0]
    assert np.array_equal(adapter.attention(x, x, x, mask)[0], added)
    assert not np.array_equal(adapter.attention(x, x, x)[0], added)


def test_wrong_arguments_are_refused_by_name() -> None:
    x, flat = np.ones((1, 2, 5, 8), np.float32), np.ones((1, 5, 16), np.float32)
    with pytest.raises(ValueError, match="qk_matmul_output_mode"):
        adapter.attention(x, x, x, qk_matmul_output_mode=4)
    with pytest.raises(ValueError, match="past_key and past_value"):
        adapter.attention(x, x, x, None, x)
    with pytest.raises(ValueError, match="nonpad_kv_seqlen cannot be combined with past_key"):
        adapter.attention(x, x, x, None, x, x, np.array([3]))
    with pytest.raises(ValueError, match="K must have 4 dimensions"):
        adapter.attention(flat, flat, flat, q_num_heads=2)
    with pytest.raises(ValueError, match="left_window_size"):
        adapter.attention(x, x, x, left_window_size=-2)
    with pytest.raises(ValueError, match="attn_mask must have no more than 5 keys"):
        adapter.attention(x, x, x, np.ones((5, 6), np.bool_))
    with pytest.raises(ValueError, match="seqused_k"):
        adapter.attention(x, x, x, nonpad_kv_seqlen=np.array([6]))
