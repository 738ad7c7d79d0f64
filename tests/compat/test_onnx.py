"""The ONNX operator Attention: the node cases that the package onnx ships."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from anyattn.compat import onnx as adapter
from anyattn.definition.dtypes import widen

OUTPUTS = ("Y", "present_key", "present_value")
SCORES = {  # these ask for the matrix of scores, a fourth output
    "test_attention_23_fullymasked_qk_matmul_output_mode3_zero",
    "test_attention_24_fullymasked_qk_matmul_output_mode3_zero",
    "test_attention_24_qk_matmul_output_mode3_softmax_precision",
    "test_attention_3d_with_past_and_present_qk_matmul",
    "test_attention_3d_with_past_and_present_qk_matmul_bias",
    "test_attention_3d_with_past_and_present_qk_matmul_softcap",
    "test_attention_3d_with_past_and_present_qk_matmul_softmax",
    "test_attention_4d_with_past_and_present_qk_matmul",
    "test_attention_4d_with_past_and_present_qk_matmul_bias",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal",
    "test_attention_4d_with_qk_matmul",
    "test_attention_4d_with_qk_matmul_bias",
    "test_attention_4d_with_qk_matmul_softcap",
    "test_attention_4d_with_qk_matmul_softmax",
    "test_attention_local_window_gqa_rank4_mask",
}


def collect() -> dict[str, Any]:
    """By name; the other half of the cases expands the node into operators that are not ours."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it makes the cases of every operator
        cases = collect_testcases("Attention")
    return {case.name: case for case in cases if not case.name.endswith("_expanded")}


CASES = collect()


def test_which_cases_there_are() -> None:
    assert len(CASES) == 93
    four = {name for name, case in CASES.items() if len(case.model.graph.node[0].output) == 4}
    assert four == SCORES


@pytest.mark.parametrize("name", sorted(CASES.keys() - SCORES))
def test_node(name: str) -> None:
    import onnx

    (node,), (given, expected) = CASES[name].model.graph.node, CASES[name].data_sets[0]
    values = iter(given)
    inputs = [next(values) if label else None for label in node.input]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    results = adapter.attention(*inputs, **attributes)
    wanted = [result for label, result in zip(node.output, results, strict=False) if label]
    assert len(wanted) == len(expected)
    # theirs rounds every step to float16 or bfloat16: as many bits as these have
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(given[0].dtype.name, 0.0)
    rtol, atol = max(CASES[name].rtol, 2 * eps), max(CASES[name].atol, 2 * eps)
    for got, want, output in zip(wanted, expected, OUTPUTS, strict=False):
        assert got.dtype == want.dtype
        values = widen(got, got.dtype.name), widen(want, want.dtype.name)
        np.testing.assert_allclose(*values, rtol=rtol if output == "Y" else 0, atol=atol if output == "Y" else 0)


def test_double_precision_of_the_softmax() -> None:
    q = np.random.default_rng(0).standard_normal((1, 2, 5, 8)).astype(np.float16)
    exact = adapter.attention(*[q.astype(np.float64)] * 3)[0]
    got = adapter.attention(q, q, q, softmax_precision=adapter.DOUBLE)[0]
    assert got.dtype == np.float16
    assert np.array_equal(got, exact.astype(np.float16))


def test_wrong_arguments() -> None:
    x, flat = np.ones((1, 2, 5, 8), np.float32), np.ones((1, 5, 16), np.float32)
    with pytest.raises(ValueError, match="qk_matmul_output_mode"):
        adapter.attention(x, x, x, qk_matmul_output_mode=3)
    with pytest.raises(ValueError, match="past_key and past_value"):
        adapter.attention(x, x, x, None, x)
    with pytest.raises(ValueError, match="nonpad_kv_seqlen and past_key"):
        adapter.attention(x, x, x, None, x, x, np.array([3]))
    with pytest.raises(ValueError, match="K must have 4 dimensions"):
        adapter.attention(flat, flat, flat, q_num_heads=2)
    with pytest.raises(ValueError, match="left_window_size"):
        adapter.attention(x, x, x, left_window_size=-2)
    with pytest.raises(ValueError, match="attn_mask must have no more than 5 keys"):
        adapter.attention(x, x, x, np.ones((5, 6), np.bool_))
    with pytest.raises(ValueError, match="seqused_k"):
        adapter.attention(x, x, x, nonpad_kv_seqlen=np.array([6]))
