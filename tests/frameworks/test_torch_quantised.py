"""Appends to quantised caches of tensors under torch.compile, whose operations quantise as the CPU engine does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn.definition.dtypes import QUANTISED


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROTARY = {"rotary_cos": normal(16, 3, seed=4).cos(), "rotary_sin": normal(16, 3, seed=4).sin()}
CACHES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "dense": ((2, 16, 2, 8), {}),
    "rotary": ((2, 16, 2, 8), ROTARY),
    "entries": ((4, 16, 2, 8), {"cache_batch_idx": torch.tensor([3, 1])}),
    "paged": ((9, 4, 2, 8), {**ROTARY, "block_table": torch.tensor([[8, 1, 0, 3], [2, 4, 6, -1]])}),
}


def cache(shape: tuple[int, ...], stored: str) -> list[Tensor]:
    """Return an empty cache and its scales: k, v, k_scale, v_scale."""
    kind = getattr(torch, stored)
    return [
        torch.zeros(shape, dtype=kind),
        torch.zeros(shape, dtype=kind),
        torch.zeros(shape[:3]),
        torch.zeros(shape[:3]),
    ]


def step(arrays: list[Tensor], new: list[Tensor], lengths: Tensor, options: dict[str, Any]) -> Tensor:
    """Return two queries of two sequences, after an append of two keys."""
    k_cache, v_cache, k_scale, v_scale = arrays
    q, k, v = new
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    out: Tensor = anyattn.attention_with_kvcache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal=True, **scales, **options
    )
    return out


def check(kind: str, stored: str, dtype: torch.dtype, *, backend: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    shape, options = CACHES[kind]
    new = [normal(2, 2, heads, 8, seed=seed, dtype=dtype) for seed, heads in ((1, 4), (2, 2), (3, 2))]
    eager, compiled = cache(shape, stored), cache(shape, stored)
    call = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in range(2):
        lengths = torch.tensor([9 + 2 * n, 2 * n], dtype=torch.int32)
        torch.testing.assert_close(call(compiled, new, lengths, options), step(eager, new, lengths, options))
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("stored", QUANTISED)
def test_compiled_append_writes_what_eager_writes(stored: str, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "rotary" else torch.float32
    dynamic = (kind, stored) == ("paged", "int8") or None  # takes four times as long
    check(kind, stored, dtype, backend="aot_eager", dynamic=dynamic)


@pytest.mark.full
@pytest.mark.parametrize("stored", QUANTISED)
def test_append_in_inductor_writes_what_eager_writes(stored: str) -> None:
    check("paged", stored, torch.float32, backend="inductor", dynamic=None)
