"""The calls that the READMEs of the five systems show, under their own import lines, on a CPU, with right results."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anyattn
from anyattn import compat
from harness.plain_torch import plain_attention
from harness.tensors import leaf, normal


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with compat.install("aule", "flash_attention", "flash_attention_amd", "flash_attn_triton"):
        yield
    for name in ("aule", "flash_attention", "flash_attention_amd", "flash_attn_triton"):
        assert name not in sys.modules


def eager(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return `plain_attention` of tensors (batch, nheads, seqlen, head_dim)."""
    heads_last = [x.transpose(1, 2) for x in (q, k, v)]
    return plain_attention(*heads_last, mask=None if hidden is None else ~hidden, scale=scale)[0].transpose(1, 2)


def after(rows: int, keys: int, offset: int = 0) -> Tensor:
    """Return the mask of the keys that a causal query does not attend to."""
    return torch.arange(keys) > torch.arange(rows)[:, None] + offset


def same(got: Tensor, want: Tensor, inputs: tuple[Tensor, ...] = ()) -> None:
    """Values, and gradients of the inputs, in float64."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    dout = normal(*got.shape, seed=9)
    for one, other in zip(
        torch.autograd.grad((got * dout).sum(), inputs) if inputs else (),
        torch.autograd.grad((want * dout).sum(), inputs) if inputs else (),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_aule_trains_with_grouped_heads(kv_heads: int) -> None:
    from aule import flash_attention

    q, k, v = (leaf(2, heads, 16, 8, seed=s) for s, heads in enumerate((8, kv_heads, kv_heads)))
    same(flash_attention(q, k, v, causal=True), eager(q, k, v, after(16, 16)), (q, k, v))
    same(flash_attention(q, k, v), eager(q, k, v, after(16, 16)))
    same(flash_attention(q, k, v, False, 0.2), eager(q, k, v, scale=0.2), (q, k, v))


def test_aule_causal_mask_is_aligned_to_the_top_left() -> None:
    from aule import attention, flash_attention

    q, k = normal(1, 2, 3, 8), normal(1, 2, 7, 8, seed=1)
    same(flash_attention(q, k, k), eager(q, k, k, after(3, 7)))
    same(flash_attention(k, q, q), eager(k, q, q, after(7, 3)))
    assert attention is flash_attention


def test_aule_accepts_numpy_arrays() -> None:
    from aule import flash_attention

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 8, 32, 16)).astype(np.float32) for _ in range(3))
    out = flash_attention(q, k, v, causal=True)
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    want = eager(*[torch.from_numpy(x).double() for x in (q, k, v)], after(32, 32))
    assert np.abs(out - want.numpy()).max() < 1e-6  # what its README promises


def test_aule_applies_rotary_embeddings() -> None:
    from aule import apply_rope_separate, flash_attention, flash_attention_rope, precompute_rope_frequencies

    q, k, v = (leaf(2, heads, 9, 8, seed=s) for s, heads in enumerate((4, 2, 2)))
    cos, sin = precompute_rope_frequencies(16, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(16).float(), 1 / 10000 ** (torch.arange(4) / 4))
    assert torch.equal(cos, angles.cos().double()) and sin.shape == (16, 4)

    def turn(x: Tensor) -> Tensor:
        a, b, c, s = x[..., :4], x[..., 4:], cos[:9], sin[:9]
        return torch.cat((a * c - b * s, a * s + b * c), -1)

    want = eager(turn(q), turn(k), v, after(9, 9))
    same(flash_attention(q, k, v, rot_cos=cos, rot_sin=sin[None]), want, (q, k, v))
    same(flash_attention_rope(q, k, v, cos, sin), eager(turn(q), turn(k), v, after(9, 9)))
    near = after(9, 9) | ~after(9, 9, -4)
    same(flash_attention_rope(q, k, v, cos, sin, True, None, 3), eager(turn(q), turn(k), v, near))
    for got, x in zip(apply_rope_separate(q, k, cos, sin), (q, k), strict=True):
        same(got, turn(x))


def test_aule_unsupported_arguments_are_refused() -> None:
    from aule import flash_attention

    x = torch.ones(1, 2, 4, 8)
    with pytest.raises(TypeError, match="rot_cos"):
        flash_attention(x, x, x, torch.ones(4, 4), torch.ones(4, 4))  # the order of version 0.5
    with pytest.raises(TypeError, match="q must be a torch"):
        flash_attention(x.numpy(), x.numpy(), x.numpy(), rot_cos=torch.ones(4, 4), rot_sin=torch.ones(4, 4))
    with pytest.raises(ValueError, match="together"):
        flash_attention(x, x, x, rot_cos=torch.ones(4, 4))
    with pytest.raises(ValueError, match="key"):
        flash_attention(x, x[0], x)


def test_aule_lists_its_backends(capsys: pytest.CaptureFixture[str]) -> None:
    from aule import get_available_backends, get_backend_info, print_backend_info

    names = get_available_backends()
    assert names == anyattn.get_available_backends() and names == list(get_backend_info())
    print_backend_info()
    lines = capsys.readouterr().out.splitlines()
    rule = "=" * 60
    assert lines[0] == lines[2] == lines[-1] == rule
    assert lines[3:6] == ["", f"Available backends: {names}", ""]
    blocks = [line for line in lines if line.startswith("[")]
    assert blocks == [f"[{n}] {name.upper()}{' (primary)' * (n == 1)}" for n, name in enumerate(names, 1)]
    assert sum(line.startswith("    Status: ") for line in lines) == len(names)


def test_aule_installs_itself_into_torch(capsys: pytest.CaptureFixture[str]) -> None:
    import aule

    original = F.scaled_dot_product_attention
    q, k = normal(2, 4, 5, 8), normal(2, 2, 7, 8, seed=1)
    mask = (torch.arange(7) < 6).expand(5, 7)
    want = original(q, k, k, attn_mask=mask, enable_gqa=True)
    try:
        aule.install()
        assert F.scaled_dot_product_attention is aule.scaled_dot_product_attention
        same(F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True), want)
        same(F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.5), eager(q, q, q, after(5, 5), 0.5))
        assert not capsys.readouterr().out
        aule.install("numpy", verbose=True)
        same(F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True), want)
        assert capsys.readouterr().out == "anyattn: numpy | shape=(2, 4, 5, 8) | causal=False\n"
        with pytest.raises(ValueError, match="abacus"):
            aule.install("abacus")
    finally:
        aule.uninstall()
    aule.uninstall()
    assert F.scaled_dot_product_attention is original
    same(aule.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True), want)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("blocks", [{}, {"Bc": 64, "Br": 32}, {"Bc": 1, "Br": 1000}], ids=str)
def test_flash_attention_forward_and_backward_equal_eager_attention(blocks: dict[str, int]) -> None:
    from flash_attention import flash_attention_backward, flash_attention_forward

    Q, K, V = (leaf(2, 4, 300, 8, seed=s) for s in range(3))
    O = flash_attention_forward(Q, K, V, **blocks)
    assert torch.equal(O, flash_attention_forward(Q, K, V))
    same(O, eager(Q, K, V), (Q, K, V))
    O, l, m = flash_attention_forward(Q, K, V, **blocks, return_stats=True)
    scores = Q.detach() @ K.detach().mT * 8**-0.5
    torch.testing.assert_close(m, scores.amax(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(l, (scores - m[..., None]).exp().sum(-1), rtol=1e-11, atol=1e-11)
    dO = normal(2, 4, 300, 8, seed=3)
    grads = flash_attention_backward(Q, K, V, O, dO, l, m, **blocks)
    assert isinstance(grads, list)
    for got, want in zip(grads, torch.autograd.grad((eager(Q, K, V) * dO).sum(), (Q, K, V)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_flash_attention_computes_in_half_precision() -> None:
    """Computed on float16 inputs; the result and the gradients have Q's dtype."""
    from flash_attention import flash_attention_backward, flash_attention_forward

    Q, K, V = (leaf(2, 4, 64, 16, seed=s, dtype=torch.float32) for s in range(3))
    O, l, m = flash_attention_forward(Q, K, V, Bc=64, Br=32, use_half=True, return_stats=True)
    O.sum().backward()
    assert O.dtype is Q.dtype and torch.equal(O, O.half().float())
    halves = [x.detach().half().double().requires_grad_() for x in (Q, K, V)]
    want = eager(*halves)
    eps = torch.finfo(torch.float16).eps
    assert (O - want).abs().max() <= 2 * eps * V.abs().max()
    want.sum().backward()
    backward = flash_attention_backward(Q, K, V, O, torch.ones_like(O), l, m, use_half=True)
    for given, half, again in zip((Q, K, V), halves, backward, strict=True):
        assert given.grad is not None and half.grad is not None and again.dtype is given.dtype
        bound = 8 * eps * max(float(half.grad.abs().max()), float(V.detach().abs().max()))
        assert (given.grad - half.grad).abs().max() <= bound
        assert (again - half.grad).abs().max() <= bound


def test_flash_attention_unsupported_arguments_are_refused() -> None:
    from flash_attention import flash_attention_forward

    x = torch.ones(1, 2, 4, 8)
    with pytest.raises(ValueError, match="Br"):
        flash_attention_forward(x, x, x, Br=0)
    with pytest.raises(ValueError, match="K"):
        flash_attention_forward(x, x[0], x)


def test_flash_attention_amd_equals_eager_attention() -> None:
    from flash_attention_amd import FlashAttention, flash_attn_func

    q, k, v = (leaf(2, rows, 4, 8, seed=s) for s, rows in enumerate((12, 16, 16)))

    def want(hidden: Tensor | None = None, scale: float | None = None) -> Tensor:
        return eager(*[x.transpose(1, 2) for x in (q, k, v)], hidden, scale).transpose(1, 2)

    same(flash_attn_func(q, k, v, causal=True), want(after(12, 16, 4)), (q, k, v))
    same(flash_attn_func(q, k, v, 0.0, 0.3, False, (3, 2)), want(after(12, 16, 6) | ~after(12, 16, 0), 0.3), (q, k, v))
    same(FlashAttention(softmax_scale=0.3)(q, k, v), want(scale=0.3))
    same(FlashAttention()(q, k, v, causal=True, window_size=(3, -1)), want(after(12, 16, 4) | ~after(12, 16, 0)))
    module = FlashAttention(attention_dropout=0.5)
    torch.manual_seed(0)
    first = module(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.5), first) and not torch.equal(module(q, k, v), first)
    same(module.eval()(q, k, v), want())


def test_flash_attn_triton_equals_eager_attention() -> None:
    from flash_attn_triton import FlashAttention, flash_attn_func, flash_attn_qkvpacked_func

    qkv = leaf(2, 13, 3, 4, 8)
    q, k, v = qkv.unbind(2)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    want = eager(*heads, after(13, 13)).transpose(1, 2)
    same(flash_attn_func(q, k, v, causal=True), want)
    same(flash_attn_qkvpacked_func(qkv, causal=True), want)
    flash_attn = FlashAttention()
    same(flash_attn(q, k, v, causal=True), want)
    same(
        flash_attn_func(q, k[:, :, :2], v[:, :, :2]), eager(heads[0], heads[1][:, :2], heads[2][:, :2]).transpose(1, 2)
    )
    (grad,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, causal=True).sum(), qkv)
    (other,) = torch.autograd.grad(want.sum(), qkv)
    torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


def test_flash_attn_triton_options_keep_their_order() -> None:
    """Check the positional order, in which softcap follows deterministic."""
    from flash_attn_triton import FlashAttention, flash_attn_func, flash_attn_qkvpacked_func

    qkv = normal(1, 6, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    slopes = torch.tensor([0.5, 0.25])
    options: tuple[Any, ...] = (0.0, 0.3, True, (2, -1), slopes, True, 4.0)
    want = anyattn.attention(q, k, v, scale=0.3, causal=True, window=(2, None), alibi_slopes=slopes, softcap=4.0)
    assert torch.equal(flash_attn_func(q, k, v, *options), want)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, *options), want)
    bias = normal(1, 2, 6, 6, seed=1)
    module = FlashAttention(0.5, 0.3)
    assert not torch.equal(module(q, k, v), module(q, k, v))
    assert torch.equal(module.eval()(q, k, v, attn_bias=bias), anyattn.attention(q, k, v, scale=0.3, bias=bias))


SIGNATURES = {
    ("aule", "flash_attention"): "query, key, value, causal=True, scale=None",
    ("aule", "install"): "backend=None, verbose=False",
    ("flash_attention", "flash_attention_forward"): "Q, K, V, Bc=32, Br=32, use_half=False, return_stats=False",
    ("flash_attention", "flash_attention_backward"): "Q, K, V, O, dO, l, m, Bc=32, Br=32, use_half=False",
    ("flash_attention_amd", "flash_attn_func"): (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)"
    ),
    ("flash_attn_triton", "flash_attn_func"): (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), alibi_slopes=None, "
        "deterministic=False, softcap=0.0, return_attn_probs=False"
    ),
}


@pytest.mark.parametrize(("module", "name"), SIGNATURES, ids="-".join)
def test_positional_signatures_equal_those_of_upstream(module: str, name: str) -> None:
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    found = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is not p.KEYWORD_ONLY
    ]
    assert ", ".join(found) == SIGNATURES[module, name]
