"""Gradients of torch tensors against autograd through a plain composite, feature by feature, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from harness.plain_torch import plain_attention
from harness.tensors import TOLERANCE, leaf, normal

BATCH, ROWS, KEYS, NHEADS, NHEADS_KV, HEAD_DIM, HEAD_DIM_V = 2, 7, 9, 4, 2, 8, 6
SEED = 1234


def bias_of(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"bias": leaf(*shape, seed=5)}


def lists(*shape: int) -> Tensor:
    """Key slots, some of which are listed twice, and -1."""
    return torch.randint(-1, KEYS, shape, generator=torch.Generator().manual_seed(3))


def with_minus_infinity() -> dict[str, Any]:
    bias = normal(1, 1, ROWS, KEYS, seed=5)
    bias[..., 2] = -torch.inf
    return {"bias": bias.requires_grad_()}


FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "causal": lambda: {"causal": True},
    "top_left": lambda: {"causal": True, "alignment": "top-left"},
    "offset": lambda: {"causal": True, "offset": 4},
    "window": lambda: {"window": (2, 1)},
    "empty_rows": lambda: {"window": (1, None), "offset": 8},
    "chunk": lambda: {"chunk": 3, "causal": True},
    "scale": lambda: {"scale": -0.3},
    "softcap": lambda: {"softcap": 2.0, "causal": True},
    "bias": bias_of(BATCH, NHEADS, ROWS, KEYS),
    "bias_of_heads": bias_of(1, NHEADS, ROWS, KEYS),
    "bias_of_keys": bias_of(BATCH, 1, 1, KEYS),
    "bias_of_two_dimensions": bias_of(ROWS, KEYS),
    "bias_of_one_number": bias_of(1, 1, 1, 1),
    "bias_with_minus_infinity": with_minus_infinity,
    "mask": lambda: {"mask": normal(BATCH, 1, ROWS, KEYS, seed=6) > 0},
    "alibi": lambda: {"alibi_slopes": normal(NHEADS, seed=7).abs(), "causal": True},
    "alibi_of_batch": lambda: {"alibi_slopes": normal(BATCH, NHEADS, seed=7).abs()},
    "sink": lambda: {"sink": leaf(NHEADS, seed=8), "causal": True},
    "sink_and_empty_rows": lambda: {"sink": leaf(NHEADS, seed=8), "window": (1, None), "offset": 8},
    "dropout": lambda: {"dropout_p": 0.3, "seed": SEED},
    "kv_indices": lambda: {"kv_indices": lists(BATCH, ROWS, 4), "causal": True, "sink": leaf(NHEADS, seed=8)},
    "kv_indices_of_heads": lambda: {"kv_indices": lists(BATCH, NHEADS_KV, ROWS, 5), "dropout_p": 0.3, "seed": SEED},
    "everything": lambda: {
        "causal": True,
        "window": (6, None),
        "softcap": 3.0,
        "bias": leaf(1, NHEADS, ROWS, 1, seed=5),
        "mask": normal(BATCH, 1, 1, KEYS, seed=6) > -1,
        "alibi_slopes": normal(NHEADS, seed=7).abs(),
        "sink": leaf(NHEADS, seed=8),
        "dropout_p": 0.2,
        "seed": SEED,
    },
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (
        leaf(BATCH, ROWS, NHEADS, HEAD_DIM, seed=1),
        leaf(BATCH, KEYS, NHEADS_KV, HEAD_DIM, seed=2),
        leaf(BATCH, KEYS, NHEADS_KV, HEAD_DIM_V, seed=3),
    )


def scalar(out: Tensor, lse: Tensor) -> Tensor:
    """A function of out and lse whose gradients are different numbers everywhere; -inf rows contribute nothing."""
    weighted = torch.where(lse.isfinite(), lse, 0.0) * normal(*lse.shape, seed=11)
    return (out * normal(*out.shape, seed=10)).sum() + weighted.sum()


def gradients(result: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(result, leaves))


@pytest.mark.parametrize("feature", FEATURES)
def test_features_have_the_gradients_of_plain_attention(feature: str) -> None:
    qkv, options = inputs(), FEATURES[feature]()
    leaves = [*qkv, *[x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]]
    out, lse = anyattn.attention(*qkv, **options, return_lse=True)
    want_out, want_lse = plain_attention(*qkv, **options)
    torch.testing.assert_close(out, want_out, **TOLERANCE)
    torch.testing.assert_close(lse, want_lse, **TOLERANCE)
    got, want = gradients(scalar(out, lse), leaves), gradients(scalar(want_out, want_lse), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_lse_alone_has_gradients() -> None:
    q, k, v = inputs()
    got = torch.autograd.grad(anyattn.attention(q, k, v, return_lse=True)[1].sum(), (q, k, v), allow_unused=True)
    want = torch.autograd.grad(plain_attention(q, k, v)[1].sum(), (q, k))
    torch.testing.assert_close(got[0], want[0], **TOLERANCE)
    torch.testing.assert_close(got[1], want[1], **TOLERANCE)
    assert got[2] is None or not got[2].any()


def test_lengths_have_the_gradients_of_shorter_calls() -> None:
    """seqused and leftpad hide what a shorter call does not have."""
    q, k, v = inputs()
    used, leftpad = torch.tensor([9, 6]), torch.tensor([2, 0])
    out = anyattn.attention(q, k, v, causal=True, seqused_k=used, leftpad_k=leftpad)
    parts = [
        plain_attention(q[b : b + 1], k[b : b + 1, left:n], v[b : b + 1, left:n], causal=True)[0]
        for b, (left, n) in enumerate(((2, 9), (0, 6)))
    ]
    want = torch.cat(parts)
    torch.testing.assert_close(out, want, **TOLERANCE)
    weight = normal(*out.shape, seed=10)
    for one, other in zip(
        gradients((out * weight).sum(), [q, k, v]), gradients((want * weight).sum(), [q, k, v]), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_packed_sequences_have_the_gradients_of_separate_calls() -> None:
    cu_q, cu_k = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 5, 6, 12], dtype=torch.int64)
    q, k, v = leaf(8, 4, 8, seed=1), leaf(12, 2, 8, seed=2), leaf(12, 2, 6, seed=3)
    sink = leaf(4, seed=4)
    options: dict[str, Any] = {"causal": True, "sink": sink}
    out, lse = anyattn.attention_varlen(q, k, v, cu_q, cu_k, 5, 6, **options, return_lse=True)
    parts = []
    for b in range(3):
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        parts.append(plain_attention(q[None, rows], k[None, keys], v[None, keys], **options))
    want_out, want_lse = torch.cat([o[0] for o, _ in parts]), torch.cat([s[0] for _, s in parts], -1)
    torch.testing.assert_close(out, want_out, **TOLERANCE)
    torch.testing.assert_close(lse, want_lse, **TOLERANCE)
    leaves = [q, k, v, sink]
    for one, other in zip(
        gradients(scalar(out, lse), leaves), gradients(scalar(want_out, want_lse), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("layout", ["packed_qkv", "packed_kv", "heads_first", "last_dimension", "expanded"])
def test_strided_inputs_have_the_gradients_of_their_buffer(layout: str) -> None:
    """Views of one buffer and transposes give the gradients of the buffer itself."""
    if layout == "packed_qkv":
        buffers = [leaf(2, 7, 3, 4, 8)]
        views = lambda: buffers[0].unbind(2)  # noqa: E731
    elif layout == "packed_kv":
        buffers = [leaf(2, 7, 4, 8), leaf(2, 9, 2, 2, 8)]
        views = lambda: (buffers[0], buffers[1][:, :, 0], buffers[1][:, :, 1])  # noqa: E731
    elif layout == "heads_first":
        buffers = [leaf(2, 4, 7, 8), leaf(2, 2, 9, 8), leaf(2, 2, 9, 8)]
        views = lambda: tuple(x.transpose(1, 2) for x in buffers)  # noqa: E731
    elif layout == "last_dimension":
        buffers = [leaf(8, 7, 4, 2), leaf(8, 9, 4, 2), leaf(6, 9, 4, 2)]
        views = lambda: tuple(x.permute(3, 1, 2, 0) for x in buffers)  # noqa: E731
    else:
        buffers = [leaf(2, 7, 4, 8), leaf(1, 9, 1, 8), leaf(1, 9, 1, 8)]
        views = lambda: (buffers[0], *(x.expand(2, 9, 4, 8) for x in buffers[1:]))  # noqa: E731
    got = gradients(scalar(*anyattn.attention(*views(), causal=True, return_lse=True)), buffers)
    want = gradients(scalar(*plain_attention(*views(), causal=True)), buffers)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_output_gradients_may_have_any_strides() -> None:
    q, k, v = inputs()
    weight = normal(HEAD_DIM_V, NHEADS, ROWS, BATCH, seed=10).permute(3, 2, 1, 0)
    for dout in (weight, torch.ones(()).double().expand(BATCH, ROWS, NHEADS, HEAD_DIM_V)):
        got = torch.autograd.grad(anyattn.attention(q, k, v), (q, k, v), dout)
        want = torch.autograd.grad(plain_attention(q, k, v)[0], (q, k, v), dout)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)


def test_gradcheck_passes() -> None:
    q, k, v = leaf(1, 3, 2, 4, seed=1), leaf(1, 4, 1, 4, seed=2), leaf(1, 4, 1, 3, seed=3)
    bias, sink = leaf(1, 2, 1, 4, seed=4), leaf(2, seed=5)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Any:
        return anyattn.attention(q, k, v, bias=bias, sink=sink, softcap=2.0, causal=True, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sink))


def test_merge_is_exact_and_differentiable() -> None:
    q, k, v = inputs()
    halves = [anyattn.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 4), slice(4, None))]
    out, lse = anyattn.merge(*halves[0], *halves[1])
    want_out, want_lse = plain_attention(q, k, v)
    torch.testing.assert_close(out, want_out, **TOLERANCE)
    torch.testing.assert_close(lse, want_lse, **TOLERANCE)
    got, want = gradients(scalar(out, lse), [q, k, v]), gradients(scalar(want_out, want_lse), [q, k, v])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_merge_of_queries_without_keys_has_finite_gradients() -> None:
    out = torch.zeros(1, 2, 1, 4, requires_grad=True)
    lse = torch.full((1, 1, 2), -torch.inf, requires_grad=True)
    merged, total = anyattn.merge(out, lse, out, lse)
    assert not merged.any()
    assert torch.equal(total, lse)
    merged.sum().backward()
    assert out.grad is not None
    assert lse.grad is not None
    assert out.grad.isfinite().all()
    assert lse.grad.isfinite().all()
