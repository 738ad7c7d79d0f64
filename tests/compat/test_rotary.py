"""flash_attn's rotary modules against the formula in float64, forward and backward, in place and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyattn.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from anyattn.compat.flash_attn.ops.triton.rotary import apply_rotary
from harness.tensors import normal

LENGTH = 24
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tables(half: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Not of unit length: XPos' tables are not either."""
    return normal(LENGTH, half, seed=seed, dtype=dtype), normal(LENGTH, half, seed=seed + 1, dtype=dtype)


def formula(x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool, sign: int = 1) -> Tensor:
    """Rows of x (rows, nheads, head_dim), one pair at a time, in float64."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    out, half = x.clone(), cos.shape[1]
    for row, position in enumerate(positions):
        for pair in range(half):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
            c, s = cos[position, pair], sign * sin[position, pair]
            out[row, :, a] = x[row, :, a] * c - x[row, :, b] * s
            out[row, :, b] = x[row, :, a] * s + x[row, :, b] * c
    return out


def close(got: Tensor, want: Tensor) -> bool:
    """Within a few roundings of the result."""
    return bool(((got.double() - want.double()).abs() <= 8 * torch.finfo(got.dtype).eps * want.abs().max()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 5, "tensor"])
def test_dense_rotation_equals_the_formula(dtype: torch.dtype, interleaved: bool, inplace: bool, offsets: Any) -> None:
    """rotary_dim 6 of a head_dim of 10, with gradients, from a leaf."""
    x, (cos, sin), dout = normal(2, 7, 3, 10, dtype=dtype), tables(3, dtype), normal(2, 7, 3, 10, seed=3, dtype=dtype)
    offsets = torch.tensor([0, 11]) if offsets == "tensor" else offsets
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * 2
    positions = [list(range(start, start + 7)) for start in starts]
    want = torch.stack([formula(x[b], cos, sin, positions[b], interleaved) for b in range(2)])
    back = torch.stack([formula(dout[b], cos, sin, positions[b], interleaved, -1) for b in range(2)])
    given = x.clone().requires_grad_()
    out = apply_rotary_emb(given, cos, sin, interleaved, inplace, offsets)
    assert (out.data_ptr() == given.data_ptr()) == inplace
    assert close(out, want) and torch.equal(out[..., 6:], x[..., 6:])
    assert out.dtype is dtype and torch.equal(given, out if inplace else x)
    before = dout.clone()
    out.backward(dout)
    assert given.grad is not None and close(given.grad, back) and torch.equal(dout, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 2, "tensor"])
def test_packed_rotation_equals_the_formula(inplace: bool, offsets: Any) -> None:
    """An empty sequence, and two rows of no sequence, which stay as they are."""
    x, (cos, sin), dout = normal(11, 2, 8), tables(4), normal(11, 2, 8, seed=3)
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    offsets = torch.tensor([3, 1, 0]) if offsets == "tensor" else offsets
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * 3
    positions = [*range(starts[0], starts[0] + 4), *range(starts[2], starts[2] + 5)]
    given = x.clone().requires_grad_()
    out = apply_rotary_emb_func(given, cos, sin, False, inplace, offsets, cu_seqlens, 5)
    assert close(out[:9], formula(x[:9], cos, sin, positions, False)) and torch.equal(out[9:], x[9:])
    out.backward(dout)
    assert given.grad is not None and close(given.grad[:9], formula(dout[:9], cos, sin, positions, False, -1))
    assert torch.equal(given.grad[9:], dout[9:])


@pytest.mark.parametrize("heads", ["three", "grouped"])
@pytest.mark.parametrize("own", [False, True])
def test_packed_qkv_is_rotated_in_place(heads: str, own: bool) -> None:
    """q and k of one buffer in place, v as it was, with one gradient; k has its own tables in XPos."""
    qkv = normal(2, 5, 3, 4, 8) if heads == "three" else normal(2, 5, 8, 8)
    parts = [(slice(None), slice(None), n) for n in range(3)] if heads == "three" else None
    q, k, v = parts or [(slice(None), slice(None), slice(*ends)) for ends in ((0, 4), (4, 6), (6, 8))]
    dout, (cos, sin) = normal(*qkv.shape, seed=3), tables(3)
    cos_k, sin_k = tables(3, seed=17) if own else (cos, sin)
    given = qkv.clone().requires_grad_()
    extra = {"cos_k": cos_k, "sin_k": sin_k} if own else {}
    count = {} if heads == "three" else {"num_heads_q": 4}
    out = apply_rotary_emb_qkv_(given, cos, sin, **extra, seqlen_offsets=2, **count)
    out.backward(dout)
    assert out.data_ptr() == given.data_ptr() and given.grad is not None
    rows = list(range(2, 7))
    for part, c, s in ((q, cos, sin), (k, cos_k, sin_k)):
        for b in range(2):
            assert close(out[part][b], formula(qkv[part][b], c, s, rows, False))
            assert close(given.grad[part][b], formula(dout[part][b], c, s, rows, False, -1))
    assert torch.equal(out[v], qkv[v]) and torch.equal(given.grad[v], dout[v])


def test_rotating_two_views_of_one_buffer_keeps_their_gradients() -> None:
    """q and kv are views of one tensor: rotating the second must not spoil the first's gradient."""
    base, dout = normal(2, 5, 8, 8), normal(2, 5, 8, 8, seed=3)
    cos, sin = tables(4)
    given = base.clone().requires_grad_()
    buffer = given * 1.0
    q, kv = buffer[:, :, :4], buffer[:, :, 4:].unflatten(2, (2, 2))
    q = apply_rotary_emb(q, cos, sin, inplace=True)
    kv = apply_rotary_emb_kv_(kv, cos, sin)
    ((q * dout[:, :, :4]).sum() + (kv.flatten(2, 3) * dout[:, :, 4:]).sum()).backward()
    want = base.clone().requires_grad_()
    turned = apply_rotary_emb(want[:, :, :6], cos, sin)
    ((turned * dout[:, :, :6]).sum() + (want[:, :, 6:] * dout[:, :, 6:]).sum()).backward()
    assert torch.equal(torch.cat((q, kv.flatten(2, 3)), 2), torch.cat((turned, base[:, :, 6:]), 2))
    assert given.grad is not None and want.grad is not None and torch.equal(given.grad, want.grad)


def test_angles_may_differ_between_sequences() -> None:
    x, cos, sin = normal(2, 5, 3, 8), normal(2, 5, 4, seed=1), normal(2, 5, 4, seed=2)
    got = apply_rotary_emb_torch(x, cos, sin, interleaved=True)
    want = torch.stack([formula(x[b], cos[b], sin[b], list(range(5)), True) for b in range(2)])
    assert close(got, want)
    assert close(apply_rotary_emb_torch(x[:1], cos[0], sin[0], interleaved=True), want[:1])


def test_conjugate_inverts_the_rotation() -> None:
    x = normal(1, 6, 2, 8)
    angles = normal(LENGTH, 4)
    there = apply_rotary(x, angles.cos(), angles.sin(), seqlen_offsets=3)
    assert apply_rotary(there, angles.cos(), angles.sin(), 3, inplace=True, conjugate=True) is there
    assert close(there, x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_scores_of_embeddings_depend_only_on_the_distance(interleaved: bool, scale_base: float | None) -> None:
    """Check the purpose of rotary positions. With XPos the scores also decay."""
    embedding = RotaryEmbedding(8, 100.0, interleaved, scale_base)
    q, k = (normal(1, 1, 1, 8, seed=seed).expand(1, 16, 1, 8).clone() for seed in (0, 1))
    v = torch.zeros_like(k)
    turned, kv = embedding(q, torch.stack((k, v), 2))
    scores = turned[0, :, 0] @ kv[0, :, 0, 0].T
    for distance in range(-8, 9):
        line = scores.diagonal(distance)
        # the angles, below 16, are those of float32
        assert (line - line[0]).abs().max() <= 16 * torch.finfo(torch.float32).eps * scores.abs().max(), distance
    packed = torch.stack([normal(1, 1, 1, 8, seed=seed).expand(1, 16, 1, 8) for seed in (0, 1, 2)], 2)
    assert torch.equal(embedding(packed.clone())[:, :, 0], turned)


def test_embedding_tables_are_computed_in_float32_and_rounded_once() -> None:
    embedding = RotaryEmbedding(8)
    angles = torch.arange(12).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    embedding(normal(1, 5, 3, 1, 8, dtype=torch.float32), seqlen_offset=7)
    assert embedding._cos_cached is not None and embedding._sin_cached is not None
    assert (embedding._cos_cached - angles.cos()).abs().max() < 4e-6  # angles below 12, in float32
    assert (embedding._sin_cached - angles.sin()).abs().max() < 4e-6
    assert not list(embedding.state_dict())
    exact = embedding._cos_cached
    embedding.bfloat16()(normal(1, 12, 3, 1, 8, dtype=torch.bfloat16))
    assert torch.equal(embedding._cos_cached, exact.bfloat16())  # rounded once, not computed in bfloat16


def test_xpos_tables_equal_the_formula() -> None:
    embedding = RotaryEmbedding(8, scale_base=16.0)
    embedding(normal(1, 12, 3, 1, 8))
    rows = torch.arange(12).double()[:, None]
    angles = rows * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    scale = ((torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)) ** ((rows - 6) / 16.0)
    for table, want in (
        (embedding._cos_cached, angles.cos() * scale),
        (embedding._sin_cached, angles.sin() * scale),
        (embedding._cos_k_cached, angles.cos() / scale),
        (embedding._sin_k_cached, angles.sin() / scale),
    ):
        assert table is not None and (table - want).abs().max() < 8e-6


def test_embedding_continues_from_an_offset() -> None:
    """A later step sees what the whole sequence saw, also after inference mode."""
    whole = RotaryEmbedding(8)(normal(2, 9, 3, 2, 8), max_seqlen=16)
    embedding = RotaryEmbedding(8)
    with torch.inference_mode():
        embedding(normal(2, 9, 3, 2, 8)[:, :2])
    x = normal(2, 9, 3, 2, 8)
    steps = [embedding(x[:, :4].clone()), embedding(x[:, 4:].clone(), seqlen_offset=torch.tensor([4, 4]), max_seqlen=9)]
    assert torch.equal(torch.cat(steps, 1), whole)
    trained = x.clone().requires_grad_()
    embedding(trained).sum().backward()
    assert trained.grad is not None


def test_compiled_equals_eager() -> None:
    (cos, sin), x = tables(4), normal(2, 6, 3, 8)

    def call(x: Tensor, offsets: Tensor) -> Tensor:
        return apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)

    offsets = torch.tensor([1, 4])
    assert close(torch.compile(call, fullgraph=True, backend="aot_eager")(x, offsets), call(x, offsets))


def test_compiled_rotation_in_place_equals_eager() -> None:
    """Check that the compiled function writes into its argument and keeps the gradient."""
    (cos, sin), kv = tables(4), normal(2, 6, 2, 3, 8)
    given, other = kv.clone().requires_grad_(), kv.clone().requires_grad_()
    out = torch.compile(apply_rotary_emb_kv_, fullgraph=True, backend="aot_eager")(given, cos, sin)
    want = apply_rotary_emb_kv_(other, cos, sin)
    out.square().sum().backward()
    want.square().sum().backward()
    assert given.grad is not None and other.grad is not None
    assert close(out, want) and close(given, other) and close(given.grad, other.grad)


ROWS, TABLES = torch.zeros(1, 4, 2, 8), (torch.zeros(6, 4), torch.zeros(6, 4))
REFUSED: dict[str, tuple[Any, str]] = {
    "rotary_dim": (lambda: apply_rotary_emb(ROWS[..., :6], *TABLES), "rotary_dim"),
    "unlike": (lambda: apply_rotary_emb(ROWS, TABLES[0], TABLES[1][:5]), "cos and sin"),
    "too long": (
        lambda: apply_rotary_emb(ROWS, *TABLES, seqlen_offsets=3),
        "must be from 0 to 6, the length of cos, got offset 3",
    ),
    "negative": (lambda: apply_rotary_emb(ROWS, *TABLES, seqlen_offsets=torch.tensor([-1])), "seqlen_offsets"),
    "batch": (lambda: apply_rotary_emb(ROWS, *TABLES, seqlen_offsets=torch.tensor([0, 1])), "seqlen_offsets"),
    "floats": (lambda: apply_rotary_emb(ROWS, *TABLES, seqlen_offsets=torch.tensor([0.0])), "seqlen_offsets"),
    "no maximum": (lambda: apply_rotary_emb(ROWS[0], *TABLES, cu_seqlens=torch.tensor([0, 4])), "max_seqlen"),
    "small maximum": (lambda: apply_rotary_emb(ROWS[0], *TABLES, cu_seqlens=torch.tensor([0, 4]), max_seqlen=3), "3"),
    "sequences": (
        lambda: apply_rotary_emb(ROWS[0], *TABLES, False, False, torch.tensor([0, 1]), torch.tensor([0, 4]), 4),
        "seqlen_offsets",
    ),
    "packed": (lambda: apply_rotary_emb(ROWS[0], *TABLES), "seqlen, nheads"),
    "heads": (lambda: apply_rotary_emb_qkv_(ROWS, *TABLES), "num_heads_q"),
    "odd heads": (lambda: apply_rotary_emb_qkv_(torch.zeros(1, 4, 5, 8), *TABLES, num_heads_q=2), "num_heads_q"),
    "half of k": (lambda: apply_rotary_emb_qkv_(ROWS[:, :, None].expand(1, 4, 3, 2, 8), *TABLES, TABLES[0]), "cos_k"),
    "kv": (lambda: apply_rotary_emb_kv_(ROWS, *TABLES), "kv"),
    "gradient": (lambda: apply_rotary_emb(ROWS, TABLES[0].clone().requires_grad_(), TABLES[1], inplace=True), "cos"),
    "offset without maximum": (lambda: RotaryEmbedding(8)(ROWS, seqlen_offset=torch.tensor([1])), "max_seqlen"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()
