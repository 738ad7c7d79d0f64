"""flash_attn's bert_padding and modules.mha: round trips, eager attention with the same weights, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattn.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from anyattn.compat.flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from anyattn.compat.flash_attn.utils.generation import InferenceParams
from harness.plain_torch import plain_output
from harness.tensors import leaf, normal

WIDTH, HEADS = 24, 4


def equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def same_gradients(module: nn.Module, got: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Compare the gradients of every parameter and input for one random output gradient."""
    wanted = (*inputs, *module.parameters())
    dout = normal(*got.shape, seed=9)
    a = torch.autograd.grad((got * dout).sum(), wanted, allow_unused=True)
    b = torch.autograd.grad((want * dout).sum(), wanted, allow_unused=True, retain_graph=True)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_pad_input_inverts_unpad_input(dtype: torch.dtype) -> None:
    x = leaf(3, 5, 2, 4)
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, MASK.to(dtype))
    assert torch.equal(rows, x[MASK]) and indices.tolist() == MASK.flatten().nonzero().flatten().tolist()
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, max_seqlen) == ([0, 3, 6, 6], torch.int32, 3)
    assert (seqused.tolist(), seqused.dtype) == ([3, 3, 0], torch.int32)
    back = pad_input(rows, indices, 3, 5)
    assert torch.equal(back, x * MASK[:, :, None, None])
    dout = normal(*x.shape, seed=1)
    (dx,) = torch.autograd.grad((back * dout).sum(), x)
    assert torch.equal(dx, dout * MASK[:, :, None, None])


def test_unpad_input_keeps_unused_rows_and_counts_used_ones() -> None:
    unused = torch.tensor([[0, 0, 0, 1, 0], [0] * 5, [1] * 5])
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(normal(3, 5, 4), MASK.long(), unused)
    assert torch.equal(rows, normal(3, 5, 4)[MASK | unused.bool()]) and len(indices) == 12
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 4, 7, 12], 5, [3, 3, 0])


def test_concatenated_sequences_are_unpadded() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = normal(3, 6, 4)
    rows, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(rows, torch.cat((x[0, :5], x[1, :5], x[2])))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, max_seqlen) == ([0, 2, 5, 8, 10, 16], torch.int32, 6)


def test_first_axis_functions_select_rows_and_keep_gradients() -> None:
    x, indices = leaf(6, 2, 3), torch.tensor([4, 0, 1])
    assert torch.equal(index_first_axis(x, indices), x[indices])
    picked, residual = index_first_axis_residual(x, indices)
    assert torch.equal(residual, x)
    (dx,) = torch.autograd.grad((2 * picked).sum() + (3 * residual).sum(), x)
    assert torch.equal(dx[:, 0, 0], torch.tensor([5, 5, 3, 3, 5, 3], dtype=torch.float64))
    put = index_put_first_axis(picked, indices, 6)
    assert torch.equal(put[indices], picked) and not put[[2, 3, 5]].any()
    with pytest.raises(ValueError, match="mask"):
        unpad_input(normal(3, 5, 4), MASK[:, :4])


@pytest.mark.parametrize("nheads", [1, 2, 6, 8, 12])
def test_alibi_slopes_are_those_of_the_paper(nheads: int) -> None:
    """The paper's: a geometric sequence from 2 ** (-8 / n); else every other one of the next power of two as well."""
    slopes = get_alibi_slopes(nheads)
    whole = 2 ** (nheads.bit_length() - 1)
    want = [2 ** (-8 / whole * (h + 1)) for h in range(whole)]
    want += [2 ** (-8 / (2 * whole) * h) for h in range(1, 2 * whole, 2)][: nheads - whole]
    assert slopes == pytest.approx(want, rel=1e-15)


@pytest.mark.parametrize("causal", [False, True])
def test_inner_modules_equal_plain_attention(causal: bool) -> None:
    """Dense and packed, flash and with a padding mask; `causal` of a call overrides the module's."""
    qkv = leaf(3, 5, 3, HEADS, 6)
    q, k, v = qkv.unbind(2)
    want = plain_output(q, k, v, causal=causal)
    for module in (FlashSelfAttention(causal), SelfAttention(causal)):
        equal(module(qkv), want)
        equal(module(qkv, causal=not causal), plain_output(q, k, v, causal=not causal))
        same_gradients(module, module(qkv), want, (qkv,))
    for cross in (FlashCrossAttention(causal), CrossAttention(causal)):
        equal(cross(q[:, 2:], qkv[:, :, 1:]), plain_output(q[:, 2:], k, v, causal=causal))
        fewer = (k[:, :, :2], v[:, :, :2])
        equal(cross(q, qkv[:, :, 1:, :2], causal=not causal), plain_output(q, *fewer, causal=not causal))
    keep = torch.tensor([[True] * 5, [True, False, True, True, True], [True, True, True, False, False]])
    want = plain_output(q, k, v, causal=causal, mask=keep[:, None, None])
    equal(SelfAttention(causal)(qkv, key_padding_mask=keep), want)
    rows, indices, cu_seqlens, longest, _ = unpad_input(qkv, keep)
    packed = FlashSelfAttention(causal, window_size=(2, -1))(rows, cu_seqlens=cu_seqlens, max_seqlen=longest)
    for b in range(3):
        alone = [x[b : b + 1, keep[b]] for x in (q, k, v)]
        equal(pad_input(packed, indices, 3, 5)[b, keep[b]], plain_output(*alone, causal=causal, window=(2, None))[0])
    lengths = (cu_seqlens, longest, cu_seqlens, longest)
    crossed = FlashCrossAttention(causal, window_size=(2, -1))(rows[:, 0], rows[:, 1:], None, *lengths)
    equal(crossed, packed)


def test_causal_mask_ends_at_the_last_key_of_the_padding_mask() -> None:
    """The last row is at the last key that the mask keeps."""
    q, kv = normal(1, 2, 1, 4), normal(1, 5, 2, 1, 4, seed=1)
    keep = torch.tensor([[True, True, True, False, False]])
    got = CrossAttention(causal=True)(q, kv, key_padding_mask=keep)
    equal(got, plain_output(q, kv[:, :3, 0], kv[:, :3, 1], causal=True))


def test_dropout_applies_only_in_training() -> None:
    qkv = normal(1, 16, 3, 2, 8)
    for kind in (FlashSelfAttention, SelfAttention):
        module = kind(attention_dropout=0.5)
        torch.manual_seed(0)
        first, second = module(qkv), module(qkv)
        torch.manual_seed(0)
        assert torch.equal(module(qkv), first) and not torch.equal(first, second)
        equal(module.eval()(qkv), plain_output(*qkv.unbind(2)))


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_heads_kv": 2, "causal": True},
    "rotary": {"rotary_emb_dim": 4, "causal": True},
    "grouped rotary": {"num_heads_kv": 2, "rotary_emb_dim": 4, "rotary_emb_interleaved": True, "causal": True},
    "biases": {"qkv_proj_bias": False, "out_proj_bias": False, "softmax_scale": 0.3},
    "residual": {"return_residual": True},
    "checkpoint": {"checkpointing": True, "causal": True},
    "convolution": {"dwconv": True, "causal": True},
    "grouped convolution": {"dwconv": True, "num_heads_kv": 2},
}


def expected(mha: MHA, x: Tensor, options: dict[str, Any], **scores: Any) -> Tensor:
    """MHA in torch operations, from its weights."""
    d, kv_heads = WIDTH // HEADS, options.get("num_heads_kv", HEADS)
    qkv = F.linear(x, mha.Wqkv.weight, mha.Wqkv.bias)
    if options.get("dwconv"):
        convolutions = [mha.dwconv_qkv] if kv_heads == HEADS else [mha.dwconv_q, mha.dwconv_kv]
        weight, bias = (torch.cat([getattr(c, n) for c in convolutions]) for n in ("weight", "bias"))
        qkv = F.conv1d(F.pad(qkv.mT, (2, 0)), weight, bias, groups=qkv.shape[-1]).mT
    q, k, v = qkv.unflatten(-1, (-1, d)).split((HEADS, kv_heads, kv_heads), 2)
    if options.get("rotary_emb_dim"):
        q, k = (rotated(y, options.get("rotary_emb_interleaved", False)) for y in (q, k))
    q = q * options.get("softmax_scale", d**-0.5) * d**0.5
    out = plain_output(q, k, v, causal=options.get("causal", False), **scores)
    return F.linear(out.flatten(2), mha.out_proj.weight, mha.out_proj.bias)


def rotated(x: Tensor, interleaved: bool) -> Tensor:
    """The first 4 values of each head as complex numbers, in the precision of the module's tables."""
    first, second = (x[..., 0:4:2], x[..., 1:4:2]) if interleaved else (x[..., :2], x[..., 2:4])
    angles = torch.outer(torch.arange(x.shape[1]).float(), 1 / 10000.0 ** (torch.arange(0, 4, 2) / 4))
    turned = torch.complex(first, second) * torch.complex(angles.cos(), angles.sin()).to(torch.complex128)[:, None]
    pair = (turned.real, turned.imag)
    return torch.cat((torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), x[..., 4:]), -1)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_mha_equals_plain_attention(shape: str, flash: bool) -> None:
    options = SHAPES[shape]
    mha, x = MHA(WIDTH, HEADS, **options, use_flash_attn=flash).double(), leaf(2, 7, WIDTH)
    got = mha(x)
    if options.get("return_residual"):
        got, residual = got
        assert torch.equal(residual, x)
    want = expected(mha, x, options)
    equal(got, want)
    same_gradients(mha, got, want, (x,))


@pytest.mark.parametrize("shape", ["rotary", "grouped rotary"])
def test_compiled_mha_equals_eager_mha(shape: str) -> None:
    """The rotation in place of two views of one projection too."""
    mha, x = MHA(WIDTH, HEADS, **SHAPES[shape], use_flash_attn=True).double(), leaf(2, 7, WIDTH)
    want = mha(x)
    got = torch.compile(mha, fullgraph=True, backend="aot_eager")(x)
    equal(got, want)
    same_gradients(mha, got, want, (x,))


def test_mha_applies_window_alibi_and_packed_sequences() -> None:
    options: dict[str, Any] = {"num_heads_kv": 2, "causal": True, "use_alibi": True, "window_size": (3, -1)}
    mha, x = MHA(WIDTH, HEADS, **options, use_flash_attn=True).double(), leaf(2, 7, WIDTH)
    scores = {"window": (3, None), "alibi_slopes": torch.tensor(get_alibi_slopes(HEADS))}
    want = expected(mha, x, options, **scores)
    equal(mha(x), want)
    same_gradients(mha, mha(x), want, (x,))
    packed = MHA(WIDTH, HEADS, causal=True, use_flash_attn=True).double()
    cu_seqlens = torch.tensor([0, 5, 7], dtype=torch.int32)
    got = packed(x[0], cu_seqlens=cu_seqlens, max_seqlen=5)
    equal(got, torch.cat([packed(x[:1, :5])[0], packed(x[:1, 5:])[0]]))


def test_mha_applies_a_padding_mask() -> None:
    mha, x = MHA(WIDTH, HEADS, causal=True).double(), normal(2, 5, WIDTH)
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    equal(mha(x, key_padding_mask=keep), expected(mha, x, {"causal": True}, mask=keep[:, None, None]))


@pytest.mark.parametrize("flash", [False, True])
def test_cross_attention_equals_plain_attention(flash: bool) -> None:
    mha = MHA(WIDTH, HEADS, 2, cross_attn=True, use_flash_attn=flash, return_residual=True).double()
    x, x_kv = leaf(2, 5, WIDTH), leaf(2, 8, WIDTH, seed=1)
    q = F.linear(x, mha.Wq.weight, mha.Wq.bias).unflatten(-1, (HEADS, -1))
    k, v = F.linear(x_kv, mha.Wkv.weight, mha.Wkv.bias).unflatten(-1, (2, 2, -1)).unbind(2)
    want = F.linear(plain_output(q, k, v).flatten(2), mha.out_proj.weight, mha.out_proj.bias)
    got, residual = mha(x, x_kv)
    assert residual is x
    equal(got, want)
    same_gradients(mha, got, want, (x, x_kv))
    equal(mha(x, x_kv, mixer_subset=slice(0, 1))[0], want[:, :1])


GENERATING: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_heads_kv": 2},
    "rotary": {"rotary_emb_dim": 4},
    "grouped rotary": {"num_heads_kv": 1, "rotary_emb_dim": 6, "rotary_emb_interleaved": True},
    "xpos": {"rotary_emb_dim": 6, "rotary_emb_scale_base": 64.0},
    "window": {"use_flash_attn": True, "use_alibi": True, "window_size": (2, 0)},
    "flash rotary": {"use_flash_attn": True, "rotary_emb_dim": 6},
}


@pytest.mark.parametrize("kind", GENERATING)
@torch.no_grad()
def test_generation_equals_the_forward_pass_of_the_whole_sequence(kind: str) -> None:
    """A prompt, single steps, a chunk; then sequences of different lengths; other cache entries stay as they are."""
    mha, x = MHA(WIDTH, HEADS, causal=True, layer_idx=3, **GENERATING[kind]).double(), normal(2, 12, WIDTH)
    want = mha(x)
    cache = mha.allocate_inference_cache(4, 12).fill_(torch.nan)
    params = InferenceParams(12, 4, batch_size_offset=1, key_value_memory_dict={3: cache})
    steps = []
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 12)):
        steps.append(mha(x[:, first:last], inference_params=params))
        params.seqlen_offset = last
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-6, atol=1e-6)  # XPos' middle, float32 angles
    assert cache[[0, 3]].isnan().all() and not cache[1:3].isnan().any()
    params.lengths_per_sample = torch.tensor([4, 9], dtype=torch.int32)
    ragged = mha(torch.stack((x[0, 4:6], x[1, 9:11])), inference_params=params)
    torch.testing.assert_close(ragged, torch.stack((want[0, 4:6], want[1, 9:11])), rtol=1e-6, atol=1e-6)
    params.reset(12, 4)
    assert params.seqlen_offset == 0 and not params.lengths_per_sample.any()


@torch.no_grad()
def test_a_full_cache_raises_before_it_is_written() -> None:
    mha, params = MHA(WIDTH, HEADS, causal=True, layer_idx=0), InferenceParams(4, 1)
    mha(torch.ones(1, 3, WIDTH), inference_params=params)
    params.seqlen_offset = 3
    before = params.key_value_memory_dict[0].clone()
    with pytest.raises(ValueError, match="cache_seqlens"):
        mha(torch.ones(1, 2, WIDTH), inference_params=params)
    assert torch.equal(params.key_value_memory_dict[0][:, :3], before[:, :3])


X, CU = torch.zeros(1, 4, WIDTH), torch.tensor([0, 4])
REFUSED: dict[str, tuple[Any, str]] = {
    "width": (lambda: MHA(10, 4), "embed_dim"),
    "group": (lambda: MHA(WIDTH, 4, 3), "num_heads_kv"),
    "window": (lambda: MHA(WIDTH, 4, window_size=(3, 0)), "use_flash_attn"),
    "alibi": (lambda: MHA(WIDTH, 4, use_alibi=True), "use_flash_attn"),
    "rotary": (lambda: MHA(WIDTH, 4, cross_attn=True, rotary_emb_dim=4), "cross_attn"),
    "packed": (lambda: MHA(WIDTH, 4)(X[0], cu_seqlens=CU, max_seqlen=4), "use_flash_attn"),
    "no maximum": (lambda: MHA(WIDTH, 4, use_flash_attn=True)(X[0], cu_seqlens=CU), "max_seqlen"),
    "mask": (lambda: MHA(WIDTH, 4, use_flash_attn=True)(X, key_padding_mask=X[..., 0] == 0), "key_padding_mask"),
    "x_kv": (lambda: MHA(WIDTH, 4)(X, X), "cross_attn"),
    "layer": (lambda: MHA(WIDTH, 4)(X, inference_params=InferenceParams(4, 1)), "layer_idx"),
    "call": (lambda: MHA(WIDTH, 4, layer_idx=0)(X, inference_params=InferenceParams(4, 1), causal=True), "causal"),
    "gradient": (lambda: MHA(WIDTH, 4, layer_idx=0)(X, inference_params=InferenceParams(4, 1)), "no_grad"),
    "self": (lambda: FlashSelfAttention()(X.view(4, 3, 4, 2), cu_seqlens=CU), "max_seqlen"),
    "cross": (lambda: FlashCrossAttention()(X.view(8, 3, 4), X.view(4, 2, 3, 4), cu_seqlens=CU), "cu_seqlens_k"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_arguments_are_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()
