"""The kernels of torch's attention operators on a GPU, registered for the CPU here: what they pass on is the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn.frameworks.torch.aten import KERNELS

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS["CUDA"].items():
        library.impl(name, kernel, "CPU")
    yield
    library._destroy()


def leaves(rows: tuple[int, int, int], *, by_rows: bool = False) -> list[Tensor]:
    """(2, 3, n, 8); by_rows: as views of (2, n, 3, 8)."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, n, 3, 8) if by_rows else (2, 3, n, 8) for n in rows]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x.transpose(1, 2) if by_rows else x).requires_grad_() for x in found]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_operators_have_the_bits_of_attention(dropout_p: float, is_causal: bool) -> None:
    """Check that the results have the bits of anyattn.attention, with dropout from torch's generator.

    torch calls the operator with is_causal for as many queries as keys, and for CausalBias of the lower right.
    """

    def attention(*heads_first: Tensor, is_causal: bool, **options: float) -> Tensor:
        return anyattn.attention(*(x.transpose(1, 2) for x in heads_first), causal=is_causal, **options).transpose(1, 2)

    results = []
    for function in (lambda *x, **o: aten._scaled_dot_product_flash_attention(*x, **o)[0], attention):
        inputs = leaves((7, 9, 9))
        torch.manual_seed(5)
        out = function(*inputs, dropout_p=dropout_p, is_causal=is_causal, scale=0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def both_operators(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    found = aten._scaled_dot_product_flash_attention(q, k, v)
    saved = (q, k, v, *found[:2], None, None, *found[4:6], 0.0, False, *found[6:8])
    return found, aten._scaled_dot_product_flash_attention_backward(found[0], *saved)


@pytest.mark.parametrize("by_rows", [False, True])
def test_operators_return_the_strides_of_fake_tensors(by_rows: bool) -> None:
    inputs = [x.detach() for x in leaves((5, 9, 9), by_rows=by_rows)]
    meta = [torch.empty_strided(x.shape, x.stride(), device="meta") for x in inputs]
    (real, grads), (fake, fakes) = (both_operators(*given) for given in (inputs, meta))
    assert real[4:6] == fake[4:6] == (5, 9)
    for one, other in zip((*real[:2], real[6], *grads), (*fake[:2], fake[6], *fakes), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_packed_operators_apply_dropout() -> None:
    """torch.nn.attention.varlen's operators."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(12, 3, 8, generator=generator).requires_grad_() for _ in range(3))
    begins = torch.tensor([0, 5, 12], dtype=torch.int32)
    torch.manual_seed(5)
    out, lse, *state, _ = aten._flash_attention_forward(q, k, v, begins, begins, 7, 7, 0.3, True, False)
    torch.manual_seed(5)
    want = anyattn.attention_varlen(q, k, v, begins, begins, causal=True, dropout_p=0.3)
    assert torch.equal(out, want)
    dout = torch.ones_like(out)
    got = aten._flash_attention_backward(dout, q, k, v, out, lse, begins, begins, 7, 7, 0.3, True, *state)
    assert all(torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(want, (q, k, v), dout), strict=True))


def test_debug_mask_is_refused() -> None:
    q, k, v = leaves((5, 5, 5))
    with pytest.raises(NotImplementedError, match="return_debug_mask must be False, got True"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, True)
