"""flash_attn 4's lists of blocks, and its arguments for gathered keys: computed from the formulas, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyattn import compat
from anyattn.compat.flash_attn_4 import flash_attn_func, flash_attn_varlen_func, interface
from anyattn.compat.flash_attn_4.block_sparsity import BlockSparseTensorsTorch
from harness.plain_torch import plain_attention
from harness.tensors import close, ints, leaf, normal, qkv

ROWS, KEYS, SIZE = 7, 9, (2, 4)  # 4 blocks of queries, the last of one, and 3 of keys
BLOCKS = normal(2, 4, 4, 3, seed=5) > 0  # which pairs of blocks are attended to
BLOCKS[0, 1, 2] = False  # queries without keys
ONE_HEAD = BLOCKS[:1, :1]


def dense(**options: Any) -> tuple[Tensor, ...]:
    return qkv(ROWS, KEYS, head_dim_v=8, grad=True, **options)


def lists(blocks: Tensor, *, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Return the number and the indices of the blocks in the last axis; what is not listed is out of range."""
    count = blocks.sum(-1)
    order = blocks.int().sort(stable=True, dim=-1, descending=True).indices
    index = torch.where(torch.arange(order.shape[-1]) < count[..., None], order, 99)
    return count.int(), index[..., : int(count.max()) + spare].int()


def sparse(blocks: Tensor, *, full: Tensor | None = None, size: Any = SIZE, spare: int = 0) -> BlockSparseTensorsTorch:
    partial = blocks if full is None else blocks & ~full
    both = lists(partial, spare=spare) if full is None else (*lists(partial), *lists(blocks & full))
    return BlockSparseTensorsTorch(*both, block_size=size)


def mask(blocks: Tensor) -> Tensor:
    return blocks.repeat_interleave(SIZE[0], -2)[..., :ROWS, :].repeat_interleave(SIZE[1], -1)[..., :KEYS]


FORMS: dict[str, tuple[BlockSparseTensorsTorch, Tensor]] = {
    "one list": (sparse(BLOCKS), BLOCKS),
    "two lists": (sparse(BLOCKS, full=normal(2, 4, 4, 3, seed=6) > 0), BLOCKS),
    "all heads alike": (sparse(ONE_HEAD), ONE_HEAD.expand_as(BLOCKS)),
    "whole lists": (sparse(ONE_HEAD, spare=3 - int(ONE_HEAD.sum(-1).max())), ONE_HEAD.expand_as(BLOCKS)),
    "sizes as tensors": (sparse(BLOCKS, size=torch.tensor(SIZE)), BLOCKS),
    "nothing": (sparse(torch.zeros_like(BLOCKS)), torch.zeros_like(BLOCKS)),
}
MEANINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"causal": True, "softcap": 1.5}, {"causal": True, "softcap": 1.5}),
    ({"window_size": (3, None), "softmax_scale": 0.4}, {"window": (3, None), "scale": 0.4}),
]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("options, meaning", MEANINGS, ids=["plain", "causal", "window"])
def test_queries_attend_to_the_listed_blocks(form: Any, options: dict[str, Any], meaning: dict[str, Any]) -> None:
    """Check result, lse and gradients with causal masks and windows, through autograd and below it."""
    tensors, blocks = form
    inputs, sink = dense(), leaf(4, seed=8)
    by_keys = sparse(blocks.transpose(-1, -2))
    lists = {"block_sparse_tensors": tensors, "block_sparse_tensors_bwd": by_keys}
    out, lse = flash_attn_func(*inputs, learnable_sink=sink, return_lse=True, **lists, **options)
    want, want_lse = plain_attention(*inputs, mask=mask(blocks), sink=sink, **meaning)
    close((out, lse), (want, want_lse))
    leaves, dout = (*inputs, sink), normal(*out.shape, seed=9)
    grads = torch.autograd.grad(want, leaves, dout)
    close(torch.autograd.grad(out, leaves, dout), grads)
    saved = [x.detach() for x in (*inputs, out, dout, lse)]
    window = dict(zip(("window_size_left", "window_size_right"), options.get("window_size", ()), strict=False))
    rest = {name: x for name, x in options.items() if name != "window_size"}
    below = interface._flash_attn_bwd(*saved, learnable_sink=sink, block_sparse_tensors=by_keys, **window, **rest)
    close(below, grads)


@pytest.mark.parametrize("paged", [False, True])
def test_blocks_combine_with_lengths_and_pages(paged: bool) -> None:
    q, k, v = (x.detach() for x in dense())
    used = ints(5, 9)
    keys: dict[str, Any] = {"k": k, "v": v}
    if paged:
        table = ints(5, 1, 2, 0, 4, 3).view(2, 3)
        pages = torch.zeros(6, 3, 2, 8, dtype=torch.float64)
        keys = {name: pages.index_copy(0, table.flatten().long(), x.reshape(6, 3, 2, 8)) for name, x in keys.items()}
        keys["page_table"] = table
    out, _ = flash_attn_varlen_func(q, **keys, seqused_k=used, block_sparse_tensors=sparse(BLOCKS))
    short = torch.arange(KEYS) < used[:, None, None, None]
    close(out, plain_attention(q, k, v, mask=mask(BLOCKS) & short)[0])
    out, _ = interface._flash_attn_fwd(q, **keys, seqused_k=used, block_sparse_tensors=sparse(BLOCKS))
    close(out, plain_attention(q, k, v, mask=mask(BLOCKS) & short)[0])


def test_class_has_the_import_path_of_upstream() -> None:
    with compat.install("flash_attn", force=True):
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch as Theirs
    assert Theirs is BlockSparseTensorsTorch


GOOD = sparse(BLOCKS)
WRONG: dict[str, tuple[BlockSparseTensorsTorch, type[Exception], str]] = {
    "no block size": (sparse(BLOCKS, size=None), NotImplementedError, "must have a block_size, got None"),
    "packed": (GOOD._replace(cu_total_m_blocks=ints(0, 4)), NotImplementedError, "packed sequences is not supported"),
    "empty blocks": (sparse(BLOCKS, size=(0, 4)), ValueError, "block_size of positive numbers"),
    "three sizes": (sparse(BLOCKS, size=(2, 4, 4)), ValueError, "block_size must have two elements"),
    "fractions": (sparse(BLOCKS, size=(2.0, 4.0)), TypeError, "block_size must be an integer"),
    "other sizes": (sparse(BLOCKS, size=(3, 4)), ValueError, r"must be \(2, 4, 3\) and \(2, 4, 3, 3\)"),
    "other heads": (
        sparse(BLOCKS[:, :3]),
        ValueError,
        "mask_block_cnt and block_sparse_tensors.mask_block_idx must be",
    ),
    "no indices": (GOOD._replace(full_block_cnt=GOOD[0]), ValueError, "full_block_idx must be passed together"),
    "index": (GOOD._replace(mask_block_idx=GOOD[1] + 1), ValueError, "mask_block_idx must be 0 to 2"),
    "count": (GOOD._replace(mask_block_cnt=GOOD[0] + 3), ValueError, "mask_block_cnt must be 0 to 3"),
    "twice": (GOOD._replace(mask_block_idx=GOOD[1] * 0), ValueError, "mask_block_idx must list each block once"),
    "in both": (GOOD._replace(full_block_cnt=GOOD[0], full_block_idx=GOOD[1]), ValueError, "list each block once"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_lists_are_refused(wrong: tuple[BlockSparseTensorsTorch, type[Exception], str]) -> None:
    tensors, error, text = wrong
    with pytest.raises(error, match=text):
        flash_attn_func(*dense(), block_sparse_tensors=tensors)


def test_blocks_with_unsupported_arguments_are_refused() -> None:
    q, k, v = dense()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    packed = {"cu_seqlens_q": ints(0, ROWS, 2 * ROWS), "cu_seqlens_k": ints(0, KEYS, 2 * KEYS)}
    for call in (
        lambda: flash_attn_func(q, k, v, q, block_sparse_tensors=GOOD),
        lambda: flash_attn_varlen_func(*flat, **packed, block_sparse_tensors=GOOD),
        lambda: interface._flash_attn_fwd(*flat, **packed, block_sparse_tensors=GOOD),
    ):
        with pytest.raises(NotImplementedError, match="block_sparse_tensors with qv, cu_seqlens_q or cu_seqlens_k"):
            call()
    with pytest.raises(ValueError, match="block_sparse_tensors_bwd must list the blocks of block_sparse_tensors"):
        flash_attn_func(q, k, v, block_sparse_tensors=GOOD, block_sparse_tensors_bwd=sparse(~BLOCKS.transpose(-1, -2)))
    with pytest.raises(ValueError, match="block_sparse_tensors_bwd needs block_sparse_tensors"):
        flash_attn_func(q, k, v, block_sparse_tensors_bwd=sparse(BLOCKS.transpose(-1, -2)))


@pytest.mark.parametrize("given", [{"gather_bwd_recompute_p": True}, {"gather_bwd_token_chunk": 64}], ids=str)
def test_arguments_for_gathered_keys_require_gathered_keys(given: dict[str, Any]) -> None:
    """Check that the arguments are refused alone, because upstream has them only for its sparse MLA."""
    for function in (flash_attn_func, flash_attn_varlen_func):
        with pytest.raises(ValueError, match="only apply to gather_kv_indices"):
            function(*dense(), **given)
        q, k, v = dense()
        lists = torch.randint(k.shape[1], (*q.shape[:2], 3), dtype=torch.int32)
        want = function(q, k, v, gather_kv_indices=lists)[0]
        assert torch.equal(function(q, k, v, gather_kv_indices=lists, **given)[0], want)
        assert function(*dense(), gather_bwd_recompute_p=False, gather_bwd_token_chunk=None)[0].requires_grad
    plain = interface._flash_attn_fwd(*dense())[0]
    assert torch.equal(interface._flash_attn_fwd(*dense(), gather_bwd_recompute_p=True)[0], plain)
