"""Tests of flash_attn 2: lse, S_dmask, random bits, windows, errors, and the functions below autograd."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn.compat import flash_attn, flash_attn_3, flash_attn_4
from anyattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from anyattn.compat.flash_attn import flash_attn_interface as interface
from anyattn.compat.flash_attn_3 import flash_attn_func as flash_attn_func_3
from anyattn.compat.flash_attn_4 import flash_attn_func as flash_attn_func_4
from anyattn.definition import philox
from harness.plain_torch import plain_attention
from harness.tensors import TOLERANCE, leaf, normal, qkv

dense = partial(qkv, head_dim_v=8, grad=True)
CU_Q, CU_K = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 10], [0, 6, 14]))


def packed() -> tuple[Tensor, ...]:
    shapes = ((10, 4, 8), (14, 2, 8), (14, 2, 8))
    return tuple(leaf(*shape, seed=seed) for seed, shape in enumerate(shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_have_the_bits_of_attention(dtype: torch.dtype) -> None:
    """Compare bits, because the accuracy of `attention` itself is tested in every dtype."""
    out, lse, _ = flash_attn_func(*dense(dtype=dtype), causal=True, window_size=(3, 0), return_attn_probs=True)
    want = anyattn.attention(*dense(dtype=dtype), causal=True, window=(3, None), return_lse=True)
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


@pytest.mark.parametrize("keys", [3, 0])
def test_queries_without_keys_give_zeros_and_infinite_lse(keys: int) -> None:
    """+inf in flash_attn 2, -inf in 3 and 4; out and gradients are 0."""
    tensors = dense(keys=keys)
    out, lse, _ = flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    empty = torch.arange(5) < 5 - keys
    assert (out[:, empty] == 0).all()
    assert torch.equal(lse == torch.inf, empty.expand(2, 4, 5))
    for other in (
        flash_attn_func_3(*tensors, causal=True, return_attn_probs=True)[1],
        flash_attn_func_4(*tensors, causal=True, return_lse=True)[1],
    ):
        assert torch.equal(other, torch.where(lse == torch.inf, -torch.inf, lse))
    out.square().sum().backward()
    assert tensors[0].grad is not None
    assert (tensors[0].grad[:, empty] == 0).all()


def test_lse_and_scores_do_not_require_gradients() -> None:
    out, lse, scores = flash_attn_func(*dense(), dropout_p=0.2, return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad
    assert not scores.requires_grad
    assert flash_attn_func(*dense(), return_attn_probs=True)[2].shape == (0,)


def attention_from(scores: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """out (rows, nheads, head_dim) of one sequence, from its part of S_dmask (nheads, rows, keys)."""
    weights = scores.abs() / scores.abs().sum(-1, keepdim=True)
    weights = weights * ~torch.signbit(scores) * philox.keep_scale(dropout_p)
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(2, 1))


def test_scores_show_the_entries_that_dropout_keeps() -> None:
    """out follows from S_dmask: exp(s - maximum), negative where dropped, 0 in the padding."""
    q, k, v = (x.detach() for x in dense())
    out, _, scores = flash_attn_func(q, k, v, 0.4, causal=True, window_size=(4, 0), return_attn_probs=True)
    assert scores.shape == (2, 4, 128, 128)
    assert (scores[:, :, 5:] == 0).all()
    assert (scores[..., 7:] == 0).all()
    assert torch.equal(scores[:, :, :5].abs().amax(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert 0 < (scores < 0).sum() < (scores > 0).sum()
    for b in range(2):
        torch.testing.assert_close(attention_from(scores[b, :, :5, :7], v[b], 0.4), out[b], **TOLERANCE)


def test_packed_sequences_return_scores() -> None:
    q, k, v = (x.detach() for x in packed())
    out, _, scores = flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 130, 8, 0.4, return_attn_probs=True)
    assert scores.shape == (2, 4, 256, 128)
    for b, (rows, keys) in enumerate(((slice(0, 3), slice(0, 6)), (slice(3, 10), slice(6, 14)))):
        part = scores[b, :, : rows.stop - rows.start, : keys.stop - keys.start]
        torch.testing.assert_close(attention_from(part, v[keys], 0.4), out[rows], **TOLERANCE)
    low = [x.bfloat16() for x in (q, k, v)]
    assert flash_attn_varlen_func(*low, CU_Q, CU_K, 7, 8, 0.4, return_attn_probs=True)[2].dtype is torch.bfloat16


def test_manual_seed_repeats_the_bits() -> None:
    def run(**options: Any) -> Tensor:
        torch.manual_seed(3)
        result = flash_attn_func(*dense(), dropout_p=0.5, **options)
        return result if isinstance(result, Tensor) else result[0]

    assert torch.equal(run(), run())
    assert torch.equal(run(), run(return_attn_probs=True))
    assert not torch.equal(run(), flash_attn_func(*dense(), dropout_p=0.5))


@pytest.mark.parametrize("window", [[2, 1], torch.tensor([2, 1])], ids=["list", "tensor"])
def test_windows_may_be_lists_and_tensors(window: Any) -> None:
    assert torch.equal(flash_attn_func(*dense(), window_size=window), flash_attn_func(*dense(), window_size=(2, 1)))


WINDOWS = [(2, 2**31 - 1), (-1, 2**31 - 1), (2, 3), (-1, 3), (2, 5), (-1, 5), (9, -1), (9, 9), (4, 4), (5, -1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("rows, keys", [(9, 5), (5, 9), (7, 7)])
def test_windows_follow_the_formula_for_all_lengths(window: tuple[int, int], rows: int, keys: int) -> None:
    """Check a right bound of 5 with 9 queries and 5 keys, which upstream treats as unbounded."""
    q, k, v = (x.detach() for x in dense(rows=rows, keys=keys))
    want = plain_attention(q, k, v, window=tuple(None if side < 0 else side for side in window))[0]
    cu_q, cu_k = (torch.tensor([0, size, 2 * size], dtype=torch.int32) for size in (rows, keys))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    for module in (flash_attn, flash_attn_3, flash_attn_4):
        unbounded = None if module is flash_attn_4 else -1
        options = {"window_size": tuple(unbounded if side < 0 else side for side in window)}
        outs = [
            module.flash_attn_func(q, k, v, **options),
            module.flash_attn_varlen_func(
                *flat, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=rows, max_seqlen_k=keys, **options
            ),
        ]
        if module is not flash_attn_4:
            outs.append(module.flash_attn_with_kvcache(q, k, v, **options))
        for result in outs:
            out = result[0] if isinstance(result, tuple) else result
            torch.testing.assert_close(out.reshape(want.shape), want, **TOLERANCE)


def test_negative_softcap_is_ignored() -> None:
    assert torch.equal(flash_attn_func(*dense(), softcap=-1.0), flash_attn_func(*dense()))


def test_alibi_slopes_may_differ_between_sequences() -> None:
    slopes = normal(2, 4, seed=7).abs()
    want = plain_attention(*dense(), causal=True, alibi_slopes=slopes)[0]
    torch.testing.assert_close(
        flash_attn_func(*dense(), causal=True, alibi_slopes=slopes.float()), want, rtol=1e-6, atol=1e-6
    )


def test_packed_tensors_receive_one_gradient() -> None:
    q, k, v = (x.detach() for x in dense(rows=7))
    kv = torch.stack((k, v), 2).requires_grad_()
    dout = normal(2, 7, 4, 8, seed=5).expand(2, 7, 4, 8)
    flash_attn_kvpacked_func(q, kv, causal=True).backward(dout.transpose(1, 2).contiguous().transpose(1, 2))
    leaves = [x.clone().requires_grad_() for x in (k, v)]
    want = torch.autograd.grad(flash_attn_func(q, *leaves, causal=True), leaves, dout)
    assert kv.grad is not None
    assert torch.equal(kv.grad, torch.stack(want, 2))
    for bad in (kv[:, :, :1], kv[0]):
        with pytest.raises(ValueError, match="kv must be"):
            flash_attn_kvpacked_func(q, bad)
    with pytest.raises(ValueError, match="qkv must be"):
        flash_attn_qkvpacked_func(kv)


ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (RuntimeError, "softcap must be 0 with dropout", {"softcap": 1.0, "dropout_p": 0.1}),
    (ValueError, "window_size", {"window_size": (1, 2, 3)}),
    (TypeError, "window_size", {"window_size": (1.5, 2)}),
    (ValueError, "dropout_p", {"dropout_p": 1.0}),
    (ValueError, "dropout_p", {"dropout_p": -0.1}),
    (ValueError, "scale", {"softmax_scale": float("nan")}),
    (ValueError, "alibi_slopes", {"alibi_slopes": torch.ones(3)}),
]


@pytest.mark.parametrize("kind, message, options", ERRORS, ids=[str(x[2]) for x in ERRORS])
def test_wrong_arguments_are_refused_by_name(kind: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(kind, match=message):
        flash_attn_func(*dense(), **options)


def test_private_functions_refuse_wrong_arguments() -> None:
    q, k, v = dense()
    with pytest.raises(RuntimeError, match="return_softmax must be False if dropout_p is 0"):
        interface._flash_attn_forward(q, k, v, 0.0, None, False, -1, -1, 0.0, None, True)
    pages = torch.tensor([[0], [1]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="num_splits must be 0 or 1 with block_table"):
        options = {"block_table": pages, "num_splits": 2}
        interface._flash_attn_varlen_forward(q.flatten(0, 1), k, v, CU_Q, CU_K, 7, 8, 0.0, None, False, **options)
    with pytest.raises(ValueError, match="rng_state"):
        interface._flash_attn_backward(
            q, q, k, v, q, q[..., 0], None, None, None, 0.1, None, False, -1, -1, 0.0, None, False
        )


def test_autograd_classes_apply_the_functions() -> None:
    q, k, v = dense()
    options = (0.0, None, True, (3, 0), 0.0, None, False)
    want = flash_attn_func(q, k, v, *options)
    assert torch.equal(interface.FlashAttnFunc.apply(q, k, v, *options, False), want)
    out, lse, _ = interface.FlashAttnFunc.apply(q, k, v, *options, True, False)
    assert torch.equal(out, want)
    assert not out.requires_grad
    assert lse.shape == (2, 4, 5)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 10], [0, 7, 14]))
    out = interface.FlashAttnVarlenFunc.apply(*flat, cu_q, cu_k, 5, 7, *options, False, None, True)
    assert torch.equal(out, want.flatten(0, 1))
    with pytest.raises(TypeError):
        interface.FlashAttnFunc.apply(q, k, v, *options, True, True, None)


GRADIENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dropout_p": (0.3, {"dropout_p": 0.3, "seed": 11}),
    "softmax_scale": (-0.4, {"scale": -0.4}),
    "causal": (True, {"causal": True}),
    "window_size_left": (2, {"window": (2, None)}),
    "window_size_right": (1, {"window": (None, 1)}),
    "softcap": (1.5, {"softcap": 1.5}),
    "alibi_slopes": (normal(4, seed=7), {"alibi_slopes": normal(4, seed=7)}),
    "deterministic": (True, {}),
    "rng_state": (torch.tensor([11, 0]), {}),
}


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_private_backward_applies_every_argument(name: str, varlen: bool) -> None:
    """Into strided buffers, from the reference's own out and lse."""
    q, k, v = dense()
    value, meaning = GRADIENTS[name]
    out, lse = plain_attention(q, k, v, **meaning)
    dout = normal(*out.shape, seed=9)
    want = torch.autograd.grad(out, (q, k, v), dout)
    packed_dkv = torch.full((2, 7, 2, 2, 8), torch.nan, dtype=torch.float64)
    into = [torch.full_like(q, torch.nan), packed_dkv[:, :, 0], packed_dkv[:, :, 1]]
    arrays = [x.detach() for x in (dout, q, k, v, out)]
    options = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size_left": -1, "deterministic": False}
    options |= {"window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "rng_state": torch.tensor([11, 0])}
    options[name] = value
    if varlen:
        cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (5, 7))
        tensors = [x.flatten(0, 1) for x in arrays]
        lengths = (cu_q, cu_k, 5, 7)
        delta = interface._flash_attn_varlen_backward(
            *tensors, lse.detach().transpose(0, 1).flatten(1), *[x.flatten(0, 1) for x in into], *lengths, **options,
            zero_tensors=True,
        )  # fmt: skip
        assert delta.shape == (4, 10)
    else:
        delta = interface._flash_attn_backward(*arrays, lse.detach(), *into, **options)
        torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2).float(), rtol=1e-5, atol=1e-5)
        interface._flash_attn_backward(*arrays, lse.detach(), None, None, None, **options)
    for one, other in zip(into, want, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_every_parameter_of_the_private_backward_is_tested() -> None:
    tested = {*GRADIENTS, "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"}
    varlen = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "zero_tensors"}
    assert set(inspect.signature(interface._flash_attn_backward).parameters) == tested
    assert set(inspect.signature(interface._flash_attn_varlen_backward).parameters) == tested | varlen


def test_private_random_state_repeats_the_dropout() -> None:
    q, k, v = dense()
    torch.manual_seed(3)
    want = flash_attn_func(q, k, v, 0.3, causal=True)
    torch.manual_seed(3)
    options = {"dropout_p": 0.3, "softmax_scale": None, "causal": True, "window_size_left": -1, "window_size_right": -1}
    options |= {"softcap": 0.0, "alibi_slopes": None}
    out, lse, scores, rng_state = interface._flash_attn_forward(q, k, v, **options, return_softmax=True)
    assert torch.equal(out, want)
    assert scores.shape == (2, 4, 128, 128)
    into = [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_backward(out, q, k, v, out, lse, *into, **options, deterministic=False, rng_state=rng_state)
    for one, other in zip(into, torch.autograd.grad(want, (q, k, v), want.detach()), strict=True):
        assert torch.equal(one, other)


def default_arguments(function: Any) -> dict[str, Any]:
    """Return the default arguments, as ring-flash-attention reads them."""
    parameters = inspect.signature(function).parameters.values()
    return {x.name: x.default for x in parameters if x.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_ring_attention_over_three_ranks_equals_one_call(causal: bool) -> None:
    """Three ranks: forward by blocks of keys, merged by lse; backward by blocks with the merged out and lse."""
    ranks, size = 3, 4
    q, k, v = dense(rows=ranks * size, keys=ranks * size)
    want = plain_attention(q, k, v, causal=causal)[0]
    dout = normal(*want.shape, seed=9)
    expected = torch.autograd.grad(want, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    parts = [slice(rank * size, (rank + 1) * size) for rank in range(ranks)]
    shared = {"dropout_p": 0.0, "softmax_scale": 8**-0.5, "window_size_left": -1, "window_size_right": -1}
    shared |= {"softcap": 0.0, "alibi_slopes": None}
    got = [torch.zeros_like(x) for x in (q, k, v)]
    for rank, rows in enumerate(parts):
        sources = [source for source in range(ranks) if source <= rank or not causal]
        blocks = []
        for source in sources:
            arguments = {**default_arguments(interface._flash_attn_forward), **shared}
            arguments |= {"q": q[:, rows], "k": k[:, parts[source]], "v": v[:, parts[source]], "return_softmax": False}
            outputs = interface._flash_attn_forward(**arguments, causal=causal and source == rank)
            assert len(outputs) == 4
            blocks.append((outputs[0], outputs[1].transpose(-2, -1).unsqueeze(-1)))
        out, lse = blocks[0]
        for block_out, block_lse in blocks[1:]:
            out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
            lse = lse - torch.nn.functional.logsigmoid(lse - block_lse)
        torch.testing.assert_close(out, want[:, rows].detach(), **TOLERANCE)
        for source in sources:
            keys = parts[source]
            buffers = [torch.empty_like(x) for x in (q[:, rows], k[:, keys], v[:, keys])]
            arguments = {**default_arguments(interface._flash_attn_backward), **shared, "deterministic": False}
            arguments |= dict(zip(("dq", "dk", "dv"), buffers, strict=True))
            interface._flash_attn_backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out, lse.squeeze(-1).transpose(1, 2), **arguments,
                causal=causal and source == rank,
            )  # fmt: skip
            for total, part, where in zip(got, buffers, (rows, keys, keys), strict=True):
                total[:, where] += part
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_compiled_results_equal_eager_results_for_all_lengths() -> None:
    torch._dynamo.reset()
    call = torch.compile(flash_attn_func, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, keys in ((5, 7), (6, 11)):
        options: dict[str, Any] = {"causal": True, "window_size": (4, 0), "softcap": 2.0}
        tensors = dense(rows, keys)
        got, want = call(*tensors, **options), flash_attn_func(*tensors, **options)
        assert torch.equal(got, want)
        for one, other in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (got, want)), strict=True):
            assert torch.equal(one, other)


def test_compiled_packed_sequences_equal_eager_ones() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, dynamic=True, backend="aot_eager")
    got, want = [], []
    for call, results in ((compiled, got), (flash_attn_varlen_func, want)):
        torch.manual_seed(3)
        for dropout_p in (0.0, 0.3):
            results.extend(call(*packed(), CU_Q, CU_K, 7, 8, dropout_p, causal=True, return_attn_probs=True))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_operators_compile_into_views_of_one_buffer() -> None:
    """Gradients of packed tensors: the operator mutates views, the graph does not."""
    torch._dynamo.reset()
    q, k, v = (x.detach() for x in dense(keys=5))
    out, lse, _, _ = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, None, True, -1, -1, 0.0, None, False)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True))

    def gradients(dkv: Tensor) -> Tensor:
        options = (0.0, None, True, -1, -1, 0.0, None, False)
        torch.ops.flash_attn._flash_attn_backward(out, q, k, v, out, lse, None, dkv[:, :, 0], dkv[:, :, 1], *options)
        return dkv + 1

    eager, compiled = (torch.zeros(2, 5, 2, 2, 8, dtype=torch.float64) for _ in range(2))
    want = gradients(eager)
    got = torch.compile(gradients, fullgraph=True, dynamic=True, backend="aot_eager")(compiled)
    assert torch.equal(got, want)
    assert torch.equal(compiled, eager)
    assert (eager != 0).all()
