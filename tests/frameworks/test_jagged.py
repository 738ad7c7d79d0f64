"""Jagged nested tensors: packed sequences through anyattn.sdpa and through torch's own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anyattn
from anyattn.compat.torch import use_anyattn
from anyattn.frameworks.torch import functional
from anyattn.frameworks.torch.jagged import Hook
from harness.plain_torch import plain_attention
from harness.tensors import close, leaf, normal

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

ROWS, KEYS = (3, 0, 5, 1), (4, 2, 3, 0)


def parts(lengths: tuple[int, ...], nheads: int = 4, head_dim: int = 8, seed: int = 0) -> list[Tensor]:
    """Return the sequences (seqlen, nheads, head_dim), which require gradients."""
    return [leaf(length, nheads, head_dim, seed=10 * seed + i) for i, length in enumerate(lengths)]


def jagged(*sequences: list[Tensor]) -> list[Tensor]:
    """Return nested tensors (batch, nheads, {seqlen}, head_dim) with the same offsets."""
    first = torch.nested.as_nested_tensor(sequences[0], layout=torch.jagged)
    return [torch.nested.nested_tensor_from_jagged(torch.cat(x), first.offsets()).transpose(1, 2) for x in sequences]


def hooked(*arguments: Any, **keywords: Any) -> Tensor:
    with use_anyattn():
        return F.scaled_dot_product_attention(*arguments, **keywords)


Function = Callable[..., Tensor]
FUNCTIONS = pytest.mark.parametrize("function", [anyattn.sdpa, hooked], ids=["sdpa", "hook"])
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "plain": ({}, {}, 4, 8),
    "scale": ({"scale": 0.3}, {"scale": 0.3}, 4, 8),
    "causal": ({"is_causal": True}, {"causal": True, "alignment": "top-left"}, 4, 8),
    "grouped": ({"enable_gqa": True}, {}, 2, 8),
    "one key head": ({}, {}, 1, 8),
    "head_dim of values": ({}, {}, 4, 6),
}


@FUNCTIONS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sequences_are_kept_apart(function: Function, case: tuple[dict[str, Any], dict[str, Any], int, int]) -> None:
    """The result and its gradients, sequence by sequence, in float64."""
    options, meaning, nheads_kv, head_dim_v = case
    q, k, v = parts(ROWS), parts(KEYS, nheads_kv, seed=1), parts(KEYS, nheads_kv, head_dim_v, seed=2)
    query, (key, value) = jagged(q)[0], jagged(k, v)
    out = function(query, key, value, **options)
    assert out.layout is torch.jagged
    assert out.shape == (*query.shape[:-1], head_dim_v)
    want = [plain_attention(*(x[None] for x in one), **meaning)[0][0] for one in zip(q, k, v, strict=True)]
    close([x.transpose(0, 1) for x in out.unbind()], want)
    weights = [normal(*x.shape, seed=9) for x in want]
    sums = (
        sum((x.transpose(0, 1) * w).sum() for x, w in zip(out.unbind(), weights, strict=True)),
        sum((x * w).sum() for x, w in zip(want, weights, strict=True)),
    )
    close(*(torch.autograd.grad(x, [*q, *k, *v]) for x in sums))


@FUNCTIONS
def test_the_result_has_the_sequences_of_the_query(function: Function) -> None:
    """Check by adding the result to the query and to torch's own result."""
    x = jagged(parts(ROWS))[0]
    out = function(x, x, x)
    close((out + x).values(), (F.scaled_dot_product_attention(x, x, x) + x).values())


def test_hook_allocates_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it torch computes the scores of every pair."""
    asked = []
    original = functional.attention
    monkeypatch.setattr(functional, "attention", lambda *x, **o: asked.append(1) or original(*x, **o))
    x = jagged(parts(ROWS))[0]
    F.scaled_dot_product_attention(x, x, x)
    assert not asked
    hooked(x, x, x)
    assert asked


def test_hooks_may_be_removed_in_any_order() -> None:
    from torch.nested._internal import ops

    original = ops.jagged_scaled_dot_product_attention
    x = jagged(parts(ROWS))[0]
    first, second = Hook(), Hook()
    first.remove()
    close(F.scaled_dot_product_attention(x, x, x).values(), anyattn.sdpa(x, x, x).values())
    second.remove()
    close(F.scaled_dot_product_attention(x, x, x).values(), anyattn.sdpa(x, x, x).values())
    ops.jagged_scaled_dot_product_attention = original


def test_rows_outside_the_sequences_are_not_read() -> None:
    """A narrowed tensor: rows outside the sequences are not read, and give 0."""
    padded = torch.full((3, 6, 4, 8), torch.nan, dtype=torch.float64)
    starts, lengths = torch.tensor([1, 0, 2]), torch.tensor([4, 6, 1])
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        padded[b, start : start + length] = normal(int(length), 4, 8, seed=b)
    narrow = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    x = narrow.transpose(1, 2)
    out = anyattn.sdpa(x, x, x, is_causal=True).transpose(1, 2)
    assert not out.values().isnan().any()
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        part = padded[b : b + 1, start : start + length]
        close(
            out.values().view(3, 6, 4, 8)[b, start : start + length][None], plain_attention(*[part] * 3, causal=True)[0]
        )


def test_dropout_equals_that_of_packed_sequences() -> None:
    x = jagged(parts(ROWS))[0]
    torch.manual_seed(3)
    out = anyattn.sdpa(x, x, x, dropout_p=0.4)
    torch.manual_seed(3)
    values, starts = x.transpose(1, 2).values(), x.transpose(1, 2).offsets()
    want = anyattn.attention_varlen(values, values, values, starts, starts, dropout_p=0.4)
    assert torch.equal(out.transpose(1, 2).values(), want)


@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_attention_compiles(is_causal: bool) -> None:
    x = jagged([x.detach().float() for x in parts(ROWS)])[0]

    def call(x: Tensor) -> Tensor:
        return anyattn.sdpa(x, x, x, is_causal=is_causal)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x).values(), call(x).values())


def test_unsupported_nested_tensors_are_refused() -> None:
    x, other = jagged(parts(ROWS))[0], jagged(parts(KEYS))[0]
    strided = torch.nested.nested_tensor([x.detach() for x in parts(ROWS)]).transpose(1, 2)
    dense = normal(4, 4, 5, 8)
    by_heads = x.transpose(1, 2)
    refused: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
        ([strided] * 3, {}, NotImplementedError, "query must be a nested tensor of layout torch.jagged"),
        ([x, dense, dense], {}, NotImplementedError, "key must be a nested tensor of layout torch.jagged"),
        ([dense, x, x], {}, NotImplementedError, "query must be a nested tensor"),
        ([by_heads] * 3, {}, NotImplementedError, "query must be .* ragged only in seqlen"),
        ([x, x, x, torch.ones(5, 5, dtype=torch.bool)], {}, NotImplementedError, "attn_mask must be None"),
        ([x, x, x, torch.ones(5, 5)], {"is_causal": True}, ValueError, "attn_mask cannot be combined"),
        ([x, x, other], {}, ValueError, "key and value must hold the same sequences"),
        ([x, *jagged(parts(ROWS, 2), parts(ROWS, 2))], {}, ValueError, r"number of heads, .*got \[4, 2, 2\]"),
    ]
    for arguments, keywords, error, text in refused:
        with pytest.raises(error, match=text):
            anyattn.sdpa(*arguments, **keywords)


def test_refusals_name_the_functions_that_accept_nested_tensors() -> None:
    x = jagged(parts(ROWS))[0].transpose(1, 2)
    with pytest.raises(TypeError, match=r"q must be a dense tensor, got a nested one. Use anyattn.sdpa"):
        anyattn.attention(x, x, x)
