"""Tensors laid out at random: each function gives the results of contiguous tensors, and writes nothing outside."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import anyattn
from anyattn.compat import flash_attn, flash_attn_3
from anyattn.frameworks.torch import aten
from anyattn.testing.layouts import around, scattered
from harness.backends import Engine
from harness.selection import every_backend

pytestmark = every_backend()

CACHES = ("k_cache", "v_cache")
SHAPES = {
    "q": (3, 9, 4, 24),
    "k": (3, 7, 2, 24),
    "v": (3, 7, 2, 12),
    "qkv": (3, 9, 3, 2, 24),
    "fused": (3, 9, 8, 24),
    "kv": (3, 9, 2, 2, 24),
    "bias": (3, 1, 9, 7),
    "sink": (4,),
    "alibi_slopes": (3, 4),
    "rows": (12, 4, 24),
    "keys": (12, 2, 24),
    "values": (12, 2, 12),
    "packed": (12, 3, 2, 24),
    "pages_k": (9, 5, 2, 24),
    "pages_v": (9, 5, 2, 12),
    "k_cache": (3, 20, 2, 24),
    "v_cache": (3, 20, 2, 12),
    "cos": (30, 8),
    "sin": (30, 8),
    "lse": (3, 4, 9),
}
TABLES = {
    "cu_seqlens": [1, 3, 9, 12],
    "cache_seqlens": [5, 0, 13],
    "cache_batch_idx": [2, 0, 1],
    "leftpad": [2, 0, 1],
    "block_table": [[3, 1, 8, 0], [7, 2, 6, 5], [4, 0, 2, 3]],
    "seqused": [4, 0, 9],
}
Call = Callable[..., Any]


def gradients(function: Call) -> Call:
    """(results, gradients of q, k, ...): the gradients that come are views too, expanded ones among them."""

    def call(*tensors: Tensor) -> tuple[Any, ...]:
        floats = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
        results = function(*floats)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [x for x in floats if x.requires_grad]
        expanded = torch.autograd.grad(sum(x.sum() for x in results), wanted, retain_graph=True)
        turned = [
            torch.linspace(-1, 1, x.numel()).reshape(x.shape[::-1]).permute(*reversed(range(x.ndim))) for x in results
        ]
        return (*results, *expanded, *torch.autograd.grad(results, wanted, turned))

    return call


def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> Any:
    return tuple(anyattn.attention_backward(dout, q, k, v, out=out, lse=lse, dlse=dlse))[:3]


def cache(function: Call, **names: str) -> Call:
    """`function` of a KV cache, with its name of each table that follows q, the caches, k and v."""

    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Any:
        options = dict(zip(names.values(), tables, strict=True))
        return function(q, k_cache, v_cache, k=k, v=v, causal=True, **options)

    return call


def transposed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out: Tensor = anyattn.sdpa(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    return out


ROTARY = {"cos": "rotary_cos", "sin": "rotary_sin"}
LENGTHS = {"cache_seqlens": "cache_seqlens"}
V2, V3 = flash_attn, flash_attn_3
CALLS: dict[str, tuple[Call, str]] = {
    "attention": (gradients(lambda q, k, v: anyattn.attention(q, k, v, causal=True, return_lse=True)), "q k v"),
    "scores": (gradients(lambda q, k, v, b, s: anyattn.attention(q, k, v, bias=b, sink=s)), "q k v bias sink"),
    "alibi": (lambda q, k, v, a: anyattn.attention(q, k, v, alibi_slopes=a), "q k v alibi_slopes"),
    "varlen": (gradients(lambda q, k, v, c: anyattn.attention_varlen(q, k, v, c, c)), "rows keys values cu_seqlens"),
    "backward": (backward, "q k v dout lse dout lse"),
    "operator": (
        lambda q, k, v, n, t: torch.ops.anyattn.forward(q, k, v, seqused_k=n, block_table=t),
        "q pages_k pages_v cache_seqlens block_table",
    ),
    "merge": (anyattn.merge, "dout lse dout lse"),
    "sdpa": (gradients(transposed), "q k v bias"),
    "kvcache": (
        cache(anyattn.attention_with_kvcache, **ROTARY, **LENGTHS, cache_batch_idx="cache_batch_idx"),
        "q k_cache v_cache k v cos sin cache_seqlens cache_batch_idx",
    ),
    "kvcache_leftpad": (
        cache(anyattn.attention_with_kvcache, **LENGTHS, leftpad="leftpad_k", seqused="seqused_q"),
        "q k_cache v_cache k v cache_seqlens leftpad seqused",
    ),
    "kvcache_paged": (
        cache(anyattn.attention_with_kvcache, **ROTARY, **LENGTHS, block_table="block_table"),
        "q pages_k pages_v k v cos sin cache_seqlens block_table",
    ),
    "fa2": (gradients(lambda q, k, v: V2.flash_attn_func(q, k, v, causal=True)), "q k v"),
    "fa2_qkvpacked": (gradients(V2.flash_attn_qkvpacked_func), "qkv"),
    "fa2_kvpacked": (gradients(lambda q, kv: V2.flash_attn_kvpacked_func(q, kv, causal=True)), "q kv"),
    "fa2_varlen": (
        gradients(lambda q, k, v, c: V2.flash_attn_varlen_func(q, k, v, c, c, 9, 9)),
        "rows keys values cu_seqlens",
    ),
    "fa2_varlen_packed": (gradients(lambda x, c: V2.flash_attn_varlen_qkvpacked_func(x, c, 9)), "packed cu_seqlens"),
    "fa2_kvcache": (
        cache(V2.flash_attn_with_kvcache, **ROTARY, **LENGTHS, leftpad="cache_leftpad"),
        "q k_cache v_cache k v cos sin cache_seqlens leftpad",
    ),
    "fa3": (gradients(lambda q, k, v: V3.flash_attn_func(q, k, v, causal=True)), "q k v"),
    "fa3_fused": (gradients(lambda x: V3.flash_attn_qkvpacked_func(x, num_heads_q=4)), "fused"),
    "fa3_kvcache": (
        cache(V3.flash_attn_with_kvcache, **ROTARY, **LENGTHS, block_table="page_table"),
        "q pages_k pages_v k v cos sin cache_seqlens block_table",
    ),
    "fa3_kvcache_rotary_seqlens": (
        cache(V3.flash_attn_with_kvcache, **ROTARY, **LENGTHS, leftpad="rotary_seqlens"),
        "q k_cache v_cache k v cos sin cache_seqlens leftpad",
    ),
}  # fmt: skip


def values(name: str, index: int) -> np.ndarray:
    if name in TABLES:
        return np.array(TABLES[name], np.int32)
    shape = (3, 9, 4, 12) if name == "dout" else SHAPES[name]
    return np.random.default_rng(index).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_strides(name: str, seed: int, engine: Engine) -> None:
    function, names = CALLS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    plain = [values(x, index) for index, x in enumerate(names.split())]
    placed = [
        scattered(x, rng, torch=True, rows="cache" in n or n.startswith("pages"))
        for n, x in zip(names.split(), plain, strict=True)
    ]
    beside = [around(*x) for x in placed]
    with anyattn.backend(engine.backend):
        want = function(*[torch.from_numpy(x) for x in plain])
        got = function(*[torch.from_numpy(x) for x, _ in placed])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    for n, (view, buffer), old, x in zip(names.split(), placed, beside, plain, strict=True):
        assert around(view, buffer) == old, f"memory around {n} was written"
        np.testing.assert_allclose(view, x, rtol=1e-5, atol=1e-6, err_msg=n)  # caches hold the new keys


@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_accepts_a_shared_block_table(batch: int) -> None:
    """Check an expanded table, whose rows are not max_pages apart."""
    given = {name: torch.from_numpy(values(name, 0)) for name in ("pages_k", "pages_v", "q")}
    table, used = torch.tensor(TABLES["block_table"][:batch]), torch.tensor(TABLES["cache_seqlens"][:batch])
    q = torch.stack([given["q"][:batch] * x for x in (1, 2, 3)])

    def call(q: Tensor) -> Any:
        options = {"cache_seqlens": used.int(), "block_table": table.int()}
        return anyattn.attention_with_kvcache(q, given["pages_k"], given["pages_v"], **options)

    torch.testing.assert_close(torch.vmap(call)(q), torch.stack([call(x) for x in q]))


def test_operators_refuse_a_value_of_another_head_dim() -> None:
    """torch's operators want one head_dim; a value of head_dim 1 was repeated to query's."""
    query, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 1)
    with pytest.raises(ValueError, match="the same head_dim"):
        aten.forward(query, query, value)
