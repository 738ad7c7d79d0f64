"""Tests of flash_attn 3 and 4 alone: fp8, lse with a gradient, negative windows, combine, and calls from torch."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattn.compat import flash_attn_3, flash_attn_4
from anyattn.compat.flash_attn_4 import interface
from harness.plain_torch import plain_attention
from harness.tensors import TOLERANCE, ints, leaf, normal, qkv

dense = partial(qkv, grad=True)
FP8 = torch.float8_e4m3fn
MODULES = [flash_attn_3, flash_attn_4]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_fp8_is_computed_in_float32_and_rounded_once(packed: bool) -> None:
    """Values are read exactly, scaled, and computed in float32; out is rounded to bfloat16 once."""
    q, k, v = (x.detach().to(FP8) for x in dense())
    factors = {f"{name}_descale": normal(2, 2, seed=seed).abs() for seed, name in enumerate("qkv", 5)}
    wide = [
        x.double() * f.repeat_interleave(x.shape[2] // 2, 1)[:, None, :, None]
        for x, f in zip((q, k, v), factors.values(), strict=True)
    ]
    want, want_lse = plain_attention(*wide, causal=True)
    options: dict[str, Any] = {**{name: x.float() for name, x in factors.items()}, "causal": True}
    options["return_attn_probs"] = True
    if packed:
        tables = (ints(0, 5, 10), ints(0, 7, 14), 5, 7)
        out, lse = flash_attn_3.flash_attn_varlen_func(*[x.flatten(0, 1) for x in (q, k, v)], *tables, **options)
        want, want_lse = want.flatten(0, 1), want_lse.transpose(0, 1).flatten(1)
    else:
        out, lse = flash_attn_3.flash_attn_func(q, k, v, **options)
    assert out.dtype is torch.bfloat16
    assert lse.dtype is torch.float32
    largest = wide[2].abs().max().item()
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=64 * 2**-24 * largest)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="one dtype"):
        flash_attn_3.flash_attn_func(q, k.float(), v.float())


def test_flash_attn_3_and_4_return_two_values() -> None:
    """Three in flash_attn 2. 4 gives its second only where it is asked for, or would be needed."""
    q, k, v = dense()
    assert len(flash_attn_3.flash_attn_func(q, k, v, return_attn_probs=True)) == 2
    out, lse = flash_attn_4.flash_attn_func(q, k, v)
    assert out.requires_grad
    assert lse is not None
    assert not lse.requires_grad
    assert flash_attn_4.flash_attn_func(q.detach(), k.detach(), v.detach())[1] is None
    with torch.no_grad():
        assert flash_attn_4.flash_attn_func(q, k, v)[1] is None
    qv = normal(2, 5, 4, 6, seed=5)
    assert flash_attn_4.flash_attn_func(q, k, v, qv, return_lse=True)[1].shape == (2, 5, 4)


REFUSED, TESTED = "refused", "tested here"
BACKWARD: dict[str, Any] = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "lse", "dlse", "dq", "dk", "dv"), TESTED),
    **dict.fromkeys(("softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"), TESTED),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "learnable_sink"), TESTED),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), TESTED),
    **dict.fromkeys(("score_mod", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars"), REFUSED),
    "block_sparse_tensors": TESTED,  # in test_flash_attn_blocks.py
    **dict.fromkeys(("m_block_size", "n_block_size", "num_threads"), 32),
    **dict.fromkeys(("num_stages_Q", "num_stages_dO", "AtomLayoutMSdP", "AtomLayoutNdKV", "AtomLayoutMdQ"), 1),
    **dict.fromkeys(("pack_gqa", "SdP_swapAB", "dKV_swapAB", "dQ_swapAB", "V_in_regs", "deterministic"), True),
}


@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
def test_lse_contributes_to_the_gradients(sink: bool) -> None:
    q, k, v = dense()
    logits = leaf(4, seed=8) if sink else None
    leaves = (q, k, v, *((logits,) if logits is not None else ()))
    dout, dlse = normal(2, 5, 4, 6, seed=9), normal(2, 4, 5, seed=10)
    out, lse = flash_attn_4.flash_attn_func(q, k, v, causal=True, learnable_sink=logits, softcap=2.0, return_lse=True)
    want = plain_attention(q, k, v, causal=True, sink=logits, softcap=2.0)
    grads = [torch.autograd.grad((a * dout).sum() + (b * dlse).sum(), leaves) for a, b in ((out, lse), want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    options: dict[str, Any] = {"causal": True, "softcap": 2.0, "learnable_sink": logits}
    arrays = [x.detach() for x in (q, k, v, out, dout)]
    below = interface._flash_attn_bwd(*arrays, lse.detach(), **options, dlse=dlse)
    assert len(below) == len(leaves)
    assert set(BACKWARD) == set(inspect.signature(interface._flash_attn_bwd).parameters)
    for name, value in BACKWARD.items():
        if value is REFUSED:
            with pytest.raises(NotImplementedError, match=f"^{name} is not supported"):
                interface._flash_attn_bwd(*arrays, lse.detach(), **options, **{name: object()})
    speed = {name: value for name, value in BACKWARD.items() if isinstance(value, int)}
    again = interface._flash_attn_bwd(*arrays, lse.detach(), **options, dlse=dlse, **speed)
    for one, two, other in zip(below, again, grads[1], strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
        assert torch.equal(one, two)


def test_backward_applies_seqused_to_packed_sequences() -> None:
    q, k, v = (x.flatten(0, 1).detach().requires_grad_() for x in dense())
    tables = {"cu_seqlens_q": ints(0, 5, 10), "cu_seqlens_k": ints(0, 7, 14)}
    tables |= {"seqused_q": ints(2, 5), "seqused_k": ints(7, 3)}
    out, lse = flash_attn_4.flash_attn_varlen_func(q, k, v, **tables, return_lse=True)
    want = torch.autograd.grad(out, (q, k, v), out.detach())
    arrays = [x.detach() for x in (q, k, v, out, out, lse)]
    for longest in ({}, {"max_seqlen_q": 5, "max_seqlen_k": torch.tensor(7)}):
        for one, other in zip(interface._flash_attn_bwd(*arrays, **tables, **longest), want, strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match="max_seqlen"):
        interface._flash_attn_bwd(*arrays, **tables, max_seqlen_q=5, max_seqlen_k=2)


def seen(left: int | None, right: int | None, rows: int = 5, keys: int = 7) -> Tensor:
    p, c = (torch.arange(rows) + keys - rows)[:, None], torch.arange(keys)
    mask = torch.ones(rows, keys, dtype=torch.bool)
    mask = mask if left is None else mask & (c >= p - left)
    return mask if right is None else mask & (c <= p + right)


WINDOWS: list[tuple[Any, bool, Tensor]] = [
    ((None, None), False, seen(None, None)),
    ((2, None), False, seen(2, None)),
    ((None, 1), False, seen(None, 1)),
    ((-1, -1), False, seen(None, None)),
    ((-2, -3), True, seen(None, 0)),
    ((-1, 3), False, seen(-1, 3)),
    ((3, -1), False, seen(3, -1)),
    ((None, -2), False, seen(None, -2)),
    ((2, 5), True, seen(2, 0)),
    (torch.tensor([2, 1]), False, seen(2, 1)),
]


@pytest.mark.parametrize("window, causal, mask", WINDOWS, ids=[f"{x[0]}-{x[1]}" for x in WINDOWS])
def test_windows_of_flash_attn_4_may_have_negative_bounds(window: Any, causal: bool, mask: Tensor) -> None:
    """A negative bound moves an edge past the row itself; two of them bound nothing."""
    tensors = dense()
    out, _ = flash_attn_4.flash_attn_func(*tensors, causal=causal, window_size=window)
    want = plain_attention(*tensors, mask=mask)[0]
    torch.testing.assert_close(out, want, **TOLERANCE)
    grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (out, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("window", [(1, 2, 3), (1.5, None)])
def test_wrong_windows_are_refused(window: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="window_size"):
        flash_attn_4.flash_attn_func(*dense(), window_size=window)


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "packed"])
def test_calls_of_torch_nn_attention_are_accepted(varlen: bool) -> None:
    """The arguments with which torch.nn.attention activates flash_attn 4, and the numbers of results that it takes."""
    q, k, v = (x.detach() for x in dense())
    tables: dict[str, Any] = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    lengths: dict[str, Any] = {"max_seqlen_q": 5, "max_seqlen_k": 7, "seqused_k": None, "page_table": None}
    buffer = torch.empty(2, 4, 5, 6, dtype=torch.float64).transpose(1, 2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = plain_attention(*leaves, window=(3, 1), scale=0.2)
    dout = normal(*want.shape, seed=9)
    expected = list(torch.autograd.grad(want, leaves, dout))
    if varlen:
        tables = {"cu_seqlens_q": ints(0, 5, 10), "cu_seqlens_k": ints(0, 7, 14)}
        q, k, v, dout, want, *expected = (x.flatten(0, 1) for x in (q, k, v, dout, want, *expected))
        want_lse, buffer = want_lse.transpose(0, 1).flatten(1), torch.empty(10, 4, 6, dtype=torch.float64)
    options: dict[str, Any] = {
        "softmax_scale": 0.2,
        "causal": False,
        "window_size_left": 3,
        "window_size_right": 1,
        **tables,
    }
    out, lse = interface._flash_attn_fwd(q, k, v, **options, **lengths, return_lse=True, num_splits=1, out=buffer)
    assert out is buffer
    torch.testing.assert_close(out, want.detach(), **TOLERANCE)
    torch.testing.assert_close(lse, want_lse.detach(), **TOLERANCE)
    kept = torch.empty_like(lse)
    assert interface._flash_attn_fwd(q, k, v, **options, lse=kept)[1] is kept
    assert torch.equal(kept, lse)
    grads = interface._flash_attn_bwd(q, k, v, out, dout, lse.contiguous(), **options, deterministic=False)
    into = [torch.empty_like(x) for x in (q, k, v)]
    again = interface._flash_attn_bwd(q, k, v, out, dout, lse, **options, dq=into[0], dk=into[1], dv=into[2])
    for one, two, buffer, other in zip(grads, again, into, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
        assert two is buffer
        assert torch.equal(one, two)


def test_absorbed_query_may_replace_q_and_k() -> None:
    """q and k None: the shared latent is key and value."""
    qv, v = normal(2, 5, 4, 6), normal(2, 7, 1, 6)
    out, _ = interface._flash_attn_fwd(None, None, v, qv=qv, causal=True)
    torch.testing.assert_close(out, plain_attention(qv, v, v, causal=True)[0], **TOLERANCE)
    with pytest.raises(TypeError, match="qv"):
        interface._flash_attn_fwd(None, None, v)


@pytest.mark.parametrize("kind", ["dense q, pages", "packed q, dense k", "dense, in use"])
def test_layouts_of_flash_attn_4_may_be_mixed(kind: str) -> None:
    q, k, v = (x.detach() for x in dense(keys=6))
    used = ints(4, 6)
    each = ((q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]) for b, n in enumerate((4, 6)))
    want = torch.cat([plain_attention(*tensors, causal=True)[0] for tensors in each])
    options: dict[str, Any] = {"causal": True, "seqused_k": used}
    if kind == "dense q, pages":
        k, v = (x.unflatten(1, (3, 2)).flatten(0, 1)[[2, 0, 4, 3, 5, 1]] for x in (k, v))
        options["page_table"] = ints(1, 5, 0, 3, 2, 4).view(2, 3)
    elif kind == "packed q, dense k":
        q, want, options["cu_seqlens_q"] = q.flatten(0, 1), want.flatten(0, 1), ints(0, 5, 10)
    else:
        options["seqused_q"] = ints(5, 5)
    torch.testing.assert_close(flash_attn_4.flash_attn_varlen_func(q, k, v, **options)[0], want, **TOLERANCE)


def lists(rows: int, keys: int, *batch: int) -> Tensor:
    """Lists with entries outside the keys on both sides, and keys that are listed twice."""
    return torch.randint(-3, keys + 3, (*batch, rows, 6), dtype=torch.int32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("absorbed", [False, True], ids=["q", "q and qv"])
def test_gathered_keys_equal_a_mask(absorbed: bool) -> None:
    q, k, v = dense()
    indices, sink, options = lists(5, 7, 2), normal(4, seed=8).requires_grad_(), {"causal": True}
    qv = normal(2, 5, 4, v.shape[-1], seed=5).requires_grad_() if absorbed else None
    leaves = [x for x in (q, k, v, sink, qv) if x is not None]
    got = flash_attn_4.flash_attn_func(
        q, k, v, qv, gather_kv_indices=indices, learnable_sink=sink, return_lse=True, **options
    )
    whole = (q, k) if qv is None else (torch.cat((q, qv), -1), torch.cat((k, v), -1))
    want = plain_attention(*whole, v, kv_indices=indices, sink=sink, **options)
    want_lse = want[1] if qv is None else want[1].mT
    torch.testing.assert_close(got[0], want[0], **TOLERANCE)
    torch.testing.assert_close(got[1], want_lse, **TOLERANCE)
    grads = (torch.autograd.grad(out.sum() + lse.sum(), leaves) for out, lse in (got, (want[0], want_lse)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("packed_q", [False, True])
def test_gathered_keys_count_within_packed_sequences(packed_q: bool) -> None:
    """Check that entries count inside the query's own sequence, and that entries beyond its end are ignored."""
    q, k, v = (x.detach() for x in dense())
    indices = lists(5, 7, 2)
    each = [(slice(b, b + 1), slice(0, n)) for b, n in enumerate((4, 7))]
    want = torch.cat([plain_attention(q[b], k[b, n], v[b, n], kv_indices=indices[b])[0] for b, n in each])
    k, v = (torch.cat([x[b, n][0] for b, n in each]) for x in (k, v))
    options: dict[str, Any] = {"cu_seqlens_k": ints(0, 4, 11), "gather_kv_indices": indices}
    if packed_q:
        q, want, options["cu_seqlens_q"] = q.flatten(0, 1), want.flatten(0, 1), ints(0, 5, 10)
        options["gather_kv_indices"] = indices.flatten(0, 1)
    torch.testing.assert_close(flash_attn_4.flash_attn_varlen_func(q, k, v, **options)[0], want, **TOLERANCE)


def test_gathered_keys_work_with_the_absorbed_query_alone() -> None:
    qv, v, indices = normal(2, 5, 4, 6), normal(2, 7, 1, 6), lists(5, 7, 2)
    out, _ = interface._flash_attn_fwd(None, None, v, qv=qv, gather_kv_indices=indices, causal=True)
    torch.testing.assert_close(out, plain_attention(qv, v, v, causal=True, kv_indices=indices)[0], **TOLERANCE)


def test_wrong_gathered_keys_are_refused() -> None:
    q, k, v = dense()
    call = flash_attn_4.flash_attn_func
    for wrong, error in ((lists(4, 7, 2), ValueError), (lists(5, 7), ValueError), (normal(2, 5, 6), TypeError)):
        with pytest.raises(error, match="gather_kv_indices must"):
            call(q, k, v, gather_kv_indices=wrong)
    pages: dict[str, Any] = {"page_table": ints(0, 1).view(2, 1), "seqused_k": ints(7, 7)}
    with pytest.raises(NotImplementedError, match="page_table cannot be combined with gather_kv_indices"):
        flash_attn_4.flash_attn_varlen_func(q, k, v, gather_kv_indices=lists(5, 7, 2), **pages)


def partial(splits: int = 3, packed: bool = False) -> tuple[Tensor, Tensor]:
    shape = (splits, 10, 4, 8) if packed else (splits, 2, 5, 4, 8)
    out, lse = normal(*shape).float(), normal(*shape[:-1], seed=1).float()
    lse[0, :, 0] = -torch.inf
    out[0, :, 0] = torch.nan
    lse[:, ..., 1:2, 2] = -torch.inf
    return out, lse


def merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    total = lse.double().logsumexp(0)
    weights = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0)).unsqueeze(-1)
    return (weights * out.nan_to_num()).sum(0), total


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_combine_merges_partial_results(packed: bool, module: Any) -> None:
    out, lse = partial(packed=packed)
    got, total = module.flash_attn_combine(out, lse)
    want, want_total = merged(out, lse)
    eps = 16 * 2**-24
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * 8)
    torch.testing.assert_close(total.double(), want_total, rtol=eps, atol=eps * 8)
    assert (got[total == -torch.inf] == 0).all()
    buffer = torch.empty(got.shape, dtype=torch.bfloat16)
    assert module.flash_attn_combine(out, lse, buffer)[0] is buffer
    assert torch.equal(buffer, got.bfloat16())
    assert torch.equal(module.flash_attn_combine(out, lse, out_dtype=torch.float16)[0], got.half())
    for bad in (lse[:-1], lse.mT.contiguous()):
        with pytest.raises(ValueError, match="lse_partial"):
            module.flash_attn_combine(out, bad)


def test_combining_attention_over_splits_equals_attention() -> None:
    q, k, v = dense()
    parts = [flash_attn_3.flash_attn_func(q, k[:, i::3], v[:, i::3], return_attn_probs=True) for i in range(3)]
    out, lse = flash_attn_3.flash_attn_combine(
        *(torch.stack(x) for x in zip(*((o, l.mT) for o, l in parts), strict=True))
    )
    want, want_lse = plain_attention(q, k, v)
    torch.testing.assert_close(out, want.detach(), **TOLERANCE)
    torch.testing.assert_close(lse, want_lse.mT.detach(), **TOLERANCE)


def test_combine_skips_unused_rows() -> None:
    out, lse = partial(packed=True)
    full = flash_attn_4.flash_attn_combine(out, lse)
    for options, used in (
        ({"cu_seqlens": ints(1, 4, 9)}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"cu_seqlens": ints(1, 4, 9), "seqused": ints(2, 3)}, [1, 2, 4, 5, 6]),
        ({"cu_seqlens": ints(1, 4, 9), "virtual_batch_idx": ints(1, 0)}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ):
        got, total = flash_attn_4.flash_attn_combine(out, lse, **options)
        rest = [row for row in range(10) if row not in used]
        assert torch.equal(got[used], full[0][used])
        assert (got[rest] == 0).all()
        assert (total[rest] == -torch.inf).all()
    out, lse = partial()
    got, total = flash_attn_4.flash_attn_combine(out, lse, seqused=ints(2, 5), return_lse=False)
    assert total is None
    assert torch.equal(got[1], flash_attn_4.flash_attn_combine(out, lse)[0][1])
    assert (got[0, 2:] == 0).all()
    with pytest.raises(ValueError, match="cu_seqlens"):
        flash_attn_4.flash_attn_combine(out, lse, cu_seqlens=ints(0, 5))
    with pytest.raises(ValueError, match="seqused"):
        flash_attn_4.flash_attn_combine(*partial(packed=True), seqused=ints(5))


def test_scheduler_metadata_is_accepted_back() -> None:
    q, k, v = dense()
    metadata = flash_attn_3.get_scheduler_metadata(2, 5, 7, 4, 2, 8, ints(7, 7))
    got = flash_attn_3.flash_attn_with_kvcache(q, k.detach(), v.detach(), scheduler_metadata=metadata)
    assert torch.equal(got, flash_attn_3.flash_attn_func(q, k, v))
    metadata = flash_attn_4.get_scheduler_metadata(5, 7, 4, 2, 8, 1, seqused_k=ints(7, 7), cu_seqlens_q=ints(0, 5, 10))
    assert metadata.shape == (2,)
    got = flash_attn_4.flash_attn_varlen_func(q, k, v, seqused_k=ints(7, 7), scheduler_metadata=metadata)[0]
    assert torch.equal(got, flash_attn_4.flash_attn_func(q, k, v)[0])
    with pytest.raises(AssertionError, match="at least one"):
        flash_attn_4.get_scheduler_metadata(5, 7, 4, 2, 8, 1)


@pytest.mark.parametrize("module", MODULES)
def test_compiled_results_equal_eager_results(module: Any) -> None:
    torch._dynamo.reset()
    sink = {"learnable_sink": normal(4, seed=8)} if module is flash_attn_4 else {"attention_chunk": 3}

    def call(*tensors: Tensor) -> Any:
        result = module.flash_attn_func(*tensors, causal=True, window_size=(3, 0), **sink)
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, keys in ((5, 7), (6, 9)):
        assert torch.equal(compiled(*dense(rows, keys)), call(*dense(rows, keys)))
