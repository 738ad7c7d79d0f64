"""torch.jit.trace: a trace is right for other values, and for other shapes it is right or raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from harness.tensors import close, ints, normal

RIGHT, RAISES = "right", "raises"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def trace(call: Callable[..., Tensor], inputs: Any) -> Any:
    """Return the trace, which torch compares with the function; no warning of the tracer is accepted."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(call, inputs)


def rows(
    batch: int = 2, seqlen_q: int = 5, seqlen_k: int = 7, nheads: int = 4, nheads_kv: int = 2, head_dim: int = 8
) -> list[Tensor]:
    """Return q, k and v (batch, seqlen, nheads, head_dim)."""
    shapes = ((seqlen_q, nheads), (seqlen_k, nheads_kv), (seqlen_k, nheads_kv))
    return [normal(batch, *shape, head_dim, seed=seed) for seed, shape in enumerate(shapes)]


def heads(nheads_kv: int = 4, **sizes: int) -> list[Tensor]:
    """Return query, key and value (batch, nheads, seqlen, head_dim)."""
    return [x.transpose(1, 2) for x in rows(nheads_kv=nheads_kv, **sizes)]


def packed(*lengths: int, keys: int) -> list[Tensor]:
    """Return q, k and v of sequences of these lengths, and their boundaries."""
    q, k, v = (x[0] for x in rows(1, sum(lengths), keys * len(lengths)))
    return [q, k, v, ints(0, *lengths).cumsum(0).int(), torch.arange(0, len(lengths) + 1, dtype=torch.int32) * keys]


def cache(batch: int = 2, new: int = 3, slots: int = 12) -> list[Tensor]:
    """Return q, the cache, new keys and values, the keys in use, and rotary tables."""
    (q, k, v), (new_k, new_v) = rows(batch, new, slots), rows(batch, new, new)[1:]
    return [q, k, v, new_k, new_v, torch.full((batch,), 4, dtype=torch.int32), normal(slots, 3), normal(slots, 3)]


def append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    out = anyattn.attention_with_kvcache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, rotary_cos=cos, rotary_sin=sin, causal=True
    )
    return torch.cat((out.flatten(), k_cache.flatten(), v_cache.flatten()))


Inputs = list[Tensor]
CASES: dict[str, tuple[Callable[..., Tensor], Inputs, list[tuple[Inputs, str]]]] = {
    "attention": (
        lambda q, k, v: anyattn.attention(q, k, v, causal=True),
        rows(),
        [(rows(3, 6, 9), RIGHT), (rows(1, 1, 2, 4, 4), RIGHT), (rows(head_dim=16), RIGHT)],
    ),
    "scale from a size": (
        lambda q, k, v: anyattn.attention(q, k, v, scale=1 / q.shape[-1]),
        rows(),
        [(rows(3, 6, 9), RIGHT), (rows(head_dim=16), RAISES)],
    ),
    "window from a size": (
        lambda q, k, v: anyattn.attention(q, k, v, window=(q.shape[1] - 2, 0)),
        rows(),
        [(rows(3), RIGHT), (rows(3, 6, 9), RAISES)],
    ),
    "offset from sizes": (
        lambda q, k, v: anyattn.attention(q, k, v, causal=True, offset=k.shape[1] - q.shape[1]),
        rows(),
        [(rows(3, 6, 9), RIGHT)],
    ),
    "offset": (lambda q, k, v: anyattn.attention(q, k, v, causal=True, offset=1), rows(), [(rows(3, 6, 9), RIGHT)]),
    "causal from a tensor": (
        lambda q, k, v, causal: anyattn.attention(q, k, v, causal=causal),
        [*rows(), torch.tensor(True)],
        [([*rows(3), torch.tensor(True)], RIGHT), ([*rows(), torch.tensor(False)], RAISES)],
    ),
    "mask": (
        lambda q, k, v, mask: anyattn.attention(q, k, v, mask=mask),
        [*rows(), normal(5, 7) > 0],
        [([*rows(3, 6, 9), normal(6, 9) > 0], RIGHT)],
    ),
    "sdpa": (anyattn.sdpa, heads(), [(heads(batch=3, seqlen_q=6, seqlen_k=9), RIGHT), (heads(nheads_kv=2), RAISES)]),
    "sdpa with a mask": (
        anyattn.sdpa,
        [*heads(), normal(5, 7)],
        [([*heads(batch=3, seqlen_q=6, seqlen_k=9), normal(6, 9)], RIGHT)],
    ),
    "sdpa of three dimensions": (
        anyattn.sdpa,
        [x[0] for x in heads()],
        [([x[1] for x in heads()], RIGHT), ([x[0] for x in heads(seqlen_q=6)], RAISES)],
    ),
    "sdpa that broadcasts": (
        anyattn.sdpa,
        [heads()[0], *(x[:1] for x in heads()[1:])],
        [(heads(batch=1), RAISES), ([heads(batch=3)[0], *(x[:1] for x in heads()[1:])], RAISES)],
    ),
    "flash_attention": (anyattn.flash_attention, heads(nheads_kv=2), [(heads(2, batch=3, seqlen_q=6), RIGHT)]),
    "packed": (
        lambda *x: anyattn.attention_varlen(*x, causal=True),
        packed(2, 3, keys=4),
        [(packed(1, 4, keys=4), RIGHT), (packed(3, 1, 2, keys=6), RIGHT)],
    ),
    "packed with a longest length": (
        lambda q, k, v, cu_q, cu_k: anyattn.attention_varlen(q, k, v, cu_q, cu_k, cu_q.diff().max(), k.shape[0]),
        packed(2, 3, keys=4),
        [(packed(3, 2, keys=4), RIGHT), (packed(1, 4, keys=4), RAISES)],
    ),
    "cache": (append, cache(), [(cache(2, 1), RAISES), (cache(3), RAISES), (cache(2, 3, 20), RAISES)]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trace_gives_the_right_result_or_raises(
    case: tuple[Callable[..., Tensor], Inputs, list[tuple[Inputs, str]]],
) -> None:
    call, inputs, others = case
    traced = trace(call, tuple(inputs))
    values = [torch.flip(x, (0,)) if x.is_floating_point() else x for x in inputs]
    for given, expected in [(inputs, RIGHT), (values, RIGHT), *others]:
        if expected == RIGHT:
            close(traced(*given), call(*given))
        else:
            with pytest.raises(RuntimeError, match="as when this function was traced"):
                traced(*given)


def test_a_trace_has_gradients() -> None:
    traced = trace(lambda q, k, v: anyattn.attention(q, k, v, causal=True), tuple(rows()))
    inputs = [x.requires_grad_() for x in rows(3, 6, 9)]
    got, want = (f(*inputs) for f in (traced, lambda *x: anyattn.attention(*x, causal=True)))
    close(*(torch.autograd.grad(x.square().sum(), inputs) for x in (got, want)))
