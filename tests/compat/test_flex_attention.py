"""Tests of flex_attention: torch's own function is the reference, with torch's own block masks and ours."""

from __future__ import annotations

import inspect
import time
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex

import anyattn
from anyattn.compat import flex_attention as ours
from anyattn.frameworks.torch import functional
from harness.score_gallery import BATCH, HEADS, gallery

N_Q, N_K = 70, 80
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def arrays(dtype: torch.dtype = torch.float64, nheads_kv: int = HEADS // 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, N_Q, 16), (nheads_kv, N_K, 16), (nheads_kv, N_K, 32))  # torch 2.6 needs powers of 2
    return tuple(torch.randn(BATCH, *shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("name", ["causal", "window", "prefix", "documents", "per_head", "dilated", "empty_rows"])
@pytest.mark.parametrize("block", [16, 128, (32, 16)], ids=str)
def test_masks_give_the_result_of_torch(name: str, block: Any) -> None:
    mask, (q, k, v) = gallery()[name].mask_mod, arrays()
    assert mask is not None
    theirs = flex.create_block_mask(mask, BATCH, HEADS, N_Q, N_K, device="cpu", BLOCK_SIZE=block)
    mine = ours.create_block_mask(mask, BATCH, HEADS, N_Q, N_K, device="cpu", BLOCK_SIZE=block)
    want, want_lse = flex.flex_attention(q, k, v, block_mask=theirs, enable_gqa=True, return_lse=True)
    for block_mask in (theirs, mine):
        out, lse = ours.flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, return_lse=True)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, want_lse.double(), rtol=0, atol=1e-5)
        also = flex.flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
        torch.testing.assert_close(also, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["alibi", "softcap", "relative_clamped", "temperature", "graph_edges", "kinds"])
def test_scores_give_the_result_of_torch_and_gradients(name: str) -> None:
    entry, (q, k, v) = gallery()[name], arrays(torch.float32)
    want = flex.flex_attention(q, k, v, entry.score_mod, enable_gqa=True)
    torch.testing.assert_close(ours.flex_attention(q, k, v, entry.score_mod, enable_gqa=True), want)
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(entry.leaves)
    out = ours.flex_attention(q, k, v, entry.score_mod, enable_gqa=True)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.square().sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert grad.abs().max() > 0


def test_unlisted_blocks_are_skipped_and_full_blocks_do_not_evaluate_the_mask() -> None:
    q, k, v = arrays()
    counts, lists = torch.tensor([[[1, 1, 0]]], dtype=torch.int32), torch.tensor([[[[2, 0], [0, 1], [0, 1]]]]).int()
    full = torch.tensor([[[0, 1, 1]]], dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0], [2, 0]]]]).int()
    mask = flex.BlockMask.from_kv_blocks(
        *(counts, lists, *full), BLOCK_SIZE=32, mask_mod=lambda b, h, i, j: j % 2 == 0, seq_lengths=(N_Q, N_K)
    )
    out = ours.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)  # eager torch looks at mask_mod alone
    dense = torch.zeros(N_Q, N_K, dtype=torch.bool)
    even = (torch.arange(N_K) % 2 == 0)[None]
    dense[:32, 64:] = even[:, 64:]
    dense[32:64, :32] = even[:, :32]
    dense[32:64, 32:64] = True
    dense[64:, 64:] = True
    expected = anyattn.attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=dense).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_blocks_that_say_what_their_function_says_leave_it_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = torch.tensor([0] * 100 + [1] * 156 + [2] * 256)
    calls: list[Any] = []
    attention = functional.attention

    def recorded(inputs: Any, options: Any, *rest: Any, **keywords: Any) -> Any:
        calls.append((inputs.extras.cu_seqlens_q is not None, options.right))
        return attention(inputs, options, *rest, **keywords)

    monkeypatch.setattr(functional, "attention", recorded)
    q = torch.randn(2, 2, 512, 8)
    for create in (flex.create_block_mask, ours.create_block_mask):
        for mask in (lambda b, h, i, j: (documents[i] == documents[j]) & (i >= j), lambda b, h, i, j: i >= j):
            ours.flex_attention(q, q, q, block_mask=create(mask, None, None, 512, 512, device="cpu"))
    assert calls == [(True, 0), (False, 0)] * 2
    fewer = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 512, 512, device="cpu")
    fewer.kv_num_blocks.zero_()  # the blocks on the diagonal are no longer listed
    ours.flex_attention(q, q, q, block_mask=fewer)
    assert calls[-1] == (False, None)


def test_a_block_mask_of_anyattn_is_a_mask_function() -> None:
    mask = gallery()["prefix"].mask_mod
    assert mask is not None
    q, k, v = (x.transpose(1, 2) for x in arrays())
    blocks = anyattn.block_mask(mask, BATCH, 1, N_Q, N_K, block_size=16)
    assert set(blocks.kinds.ravel().tolist()) == {0, 1, 2}
    torch.testing.assert_close(
        anyattn.attention(q, k, v, mask_mod=blocks), anyattn.attention(q, k, v, mask_mod=mask), rtol=0, atol=1e-14
    )
    everything = anyattn.BlockMask(torch.ones(1, 1, 2, 3, dtype=torch.int32), (40, 30))
    torch.testing.assert_close(anyattn.attention(q, k, v, mask_mod=everything), anyattn.attention(q, k, v))
    with pytest.raises(ValueError, match="block_size must be one or two integers >= 1, got 0"):
        anyattn.block_mask(mask, BATCH, 1, N_Q, N_K, block_size=0)
    with pytest.raises(ValueError, match="must be from 0 to 1 on axis 0, got 0 to 2"):
        anyattn.block_mask(mask, 3, 1, N_Q, N_K)


def test_time_of_a_long_document_mask_grows_with_its_blocks() -> None:
    """The pairs are 17 billion: whoever looked at them would take minutes."""
    documents = torch.sort(torch.randint(0, 60, (131072,)))[0]
    start = time.perf_counter()
    found = anyattn.block_mask(lambda b, h, i, j: (documents[i] == documents[j]) & (i >= j), 1, 1, 131072, 131072)
    assert time.perf_counter() - start < 5  # 20 ms on an idle core
    assert found.kinds.shape == (1, 1, 1024, 1024)


def test_torch_trains_inside_use_anyattn() -> None:
    q, k, v = (x.requires_grad_() for x in arrays())
    with ours.use_anyattn():
        flex.flex_attention(q, k, v, enable_gqa=True).sum().backward()
        compiled: Any = torch.compile(lambda *xs: flex.flex_attention(*xs, _double, enable_gqa=True))
        torch.testing.assert_close(compiled(q, k, v), ours.flex_attention(q, k, v, _double, enable_gqa=True))
    assert q.grad is not None
    assert flex.flex_attention.__module__ == "torch.nn.attention.flex_attention"


def _double(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score * 2


def test_key_and_value_of_batch_one_are_broadcast() -> None:
    q, k, v = arrays()
    out = ours.flex_attention(q, k[:1], v[:1], enable_gqa=True)
    torch.testing.assert_close(out[1], ours.flex_attention(q[1:], k[:1], v[:1], enable_gqa=True)[0])


def test_auxiliary_results_are_returned_or_refused() -> None:
    q, k, v = arrays()
    _, aux = ours.flex_attention(q, k, v, enable_gqa=True, return_aux=ours.AuxRequest(lse=True))
    _, lse = ours.flex_attention(q, k, v, enable_gqa=True, return_lse=True)
    assert torch.equal(aux.lse, lse)
    with pytest.raises(NotImplementedError, match="max_scores"):
        ours.flex_attention(q, k, v, enable_gqa=True, return_aux=ours.AuxRequest(max_scores=True))
    with pytest.raises(ValueError, match="return_lse cannot be combined with return_aux"):
        ours.flex_attention(q, k, v, enable_gqa=True, return_lse=True, return_aux=ours.AuxRequest())


def test_wrong_arguments_are_named() -> None:
    q, k, v = arrays()
    with pytest.raises(ValueError, match="enable_gqa=True"):
        ours.flex_attention(q, k, v)
    with pytest.raises(NotImplementedError, match="query must have 4 dimensions"):
        ours.flex_attention(q[0], k, v)
    with pytest.raises(ValueError, match="batch 2 or 1, got 3"):
        ours.flex_attention(q, torch.cat([k, k[:1]]), torch.cat([v, v[:1]]), enable_gqa=True)
    with pytest.raises(TypeError, match="block_mask must be a BlockMask or None, got Tensor"):
        ours.flex_attention(q, k, v, block_mask=torch.ones(3), enable_gqa=True)
    other = flex.create_block_mask(_all, 1, 1, 128, 128, device="cpu")
    with pytest.raises(ValueError, match=r"for lengths \(70, 80\) of query and key, got one for \(128, 128\)"):
        ours.flex_attention(q, k, v, block_mask=other, enable_gqa=True)
    sliced = flex.create_block_mask(_all, 1, 1, N_Q, N_K, device="cpu", BLOCK_SIZE=16)[:, :, 1:]
    sliced.mask_mod = _all
    with pytest.raises(ValueError, match=r"must have 5 rows of blocks for 70 queries, got 4\. Set seq_lengths"):
        ours.flex_attention(q, k, v, block_mask=sliced, enable_gqa=True)
    three = flex.create_block_mask(_all, 1, 3, N_Q, N_K, device="cpu")
    with pytest.raises(ValueError, match="nheads 4 or 1, got 3"):
        ours.flex_attention(q, k, v, block_mask=three, enable_gqa=True)


def test_a_block_mask_of_one_block_fits_any_length() -> None:
    q, k, v = arrays()
    whole = flex._create_empty_block_mask(q, k)
    out = ours.flex_attention(q, k, v, block_mask=whole, enable_gqa=True)
    torch.testing.assert_close(out, ours.flex_attention(q, k, v, enable_gqa=True), rtol=0, atol=1e-14)


def _all(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= 0


@pytest.mark.skipif(not hasattr(flex, "AuxRequest"), reason="an older torch has fewer parameters")
def test_signatures_equal_those_of_torch() -> None:
    for name in ("flex_attention", "create_block_mask"):
        mine, theirs = (list(inspect.signature(getattr(module, name)).parameters.values()) for module in (ours, flex))
        assert [(x.name, x.kind, x.default) for x in mine] == [(x.name, x.kind, x.default) for x in theirs], name
