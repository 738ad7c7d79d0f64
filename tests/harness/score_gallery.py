"""Common score functions and mask functions, as pairs (score_mod, mask_mod) with their captured tensors.

Every function is written for torch, and runs both on traced values and on index tensors that broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

N_Q, N_K, HEADS, BATCH = 75, 83, 4, 2


class Entry(NamedTuple):
    """Score function, mask function, and the captured tensors that have a gradient."""

    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    leaves: tuple[torch.Tensor, ...] = ()


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def gallery() -> dict[str, Entry]:
    """Return every entry, with new tensors."""
    return {**masks(), **scores()}


def masks() -> dict[str, Entry]:
    documents = torch.sort(_integers(4, max(N_Q, N_K)))[0]
    ends, prefix = _integers(N_K, N_K), torch.tensor([20, 31])
    tree = torch.rand(N_Q, N_K, generator=torch.Generator().manual_seed(3)) < 0.2
    table = _integers(2, HEADS, N_K).bool()

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx >= kv_idx

    found: dict[str, Callable[..., Any]] = {
        "causal": causal,
        "window": lambda b, h, q, kv: (q >= kv) & (q - kv <= 17),
        "prefix": lambda b, h, q, kv: (kv < prefix[b]) | (q >= kv),
        "documents": lambda b, h, q, kv: (documents[q] == documents[kv]) & (q >= kv),
        "shared_prefix": lambda b, h, q, kv: ((kv < 16) | (q // 16 == kv // 16)) & (q >= kv),
        "dilated": lambda b, h, q, kv: (q >= kv) & ((q - kv) % 3 == 0),
        "global": lambda b, h, q, kv: (torch.abs(q - kv) <= 9) | (q < 4) | (kv < 4),
        "natten_1d": lambda b, h, q, kv: torch.abs(torch.clamp(q, 4, N_Q - 5) - kv) <= 4,
        "natten_2d": lambda b, h, q, kv: (torch.abs(q // 9 - kv // 9) <= 2) & (torch.abs(q % 9 - kv % 9) <= 2),
        "tiles": lambda b, h, q, kv: ((q // 16) % 2 == (kv // 16) % 2) | (q == kv),
        "morton": lambda b, h, q, kv: (((q >> 1) & 7) ^ (kv & 7)) < 5,
        "per_head": lambda b, h, q, kv: torch.where(h < 2, q >= kv, kv - q < 12),
        "table": lambda b, h, q, kv: table[h, kv] | (q == kv),
        "ends": lambda b, h, q, kv: (kv <= ends[torch.clamp(q, 0, N_K - 1)]) & (kv > 2),
        "block_diffusion": lambda b, h, q, kv: (
            ((q // 8 == kv // 8) & (q < 40)) | ((kv >= 40) & (q // 8 > (kv - 40) // 8)) | (kv == 0)
        ),
        "tree": lambda b, h, q, kv: tree[q, kv] | (q == kv),
        "empty_rows": lambda b, h, q, kv: (q >= kv) & (q % 5 != 0),
        "everything": lambda b, h, q, kv: b.new_ones((), dtype=torch.bool),
    }
    return {name: Entry(mask_mod=mask) for name, mask in found.items()}


def scores() -> dict[str, Entry]:
    slopes = torch.exp2(-torch.arange(1.0, HEADS + 1))
    relative = _random(HEADS, N_Q + N_K).requires_grad_()
    learned, cap = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 4.0))
    edges = _random(BATCH, N_Q, N_K, seed=2).requires_grad_()
    scale_q = torch.rand(BATCH, N_Q).add(0.5).requires_grad_()
    kinds, kind_bias = _integers(5, N_K), _random(5, HEADS, seed=4).requires_grad_()

    def alibi(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score - slopes[h] * torch.abs(q - kv)

    def mixed(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        score = cap * torch.tanh(score / cap) + learned * (q - kv).abs().clamp(max=8)
        return torch.where(q % 2 == 0, score, score * torch.sigmoid(score) - 0.1 * score**2)

    def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return q >= kv

    return {
        "alibi": Entry(alibi, causal),
        "softcap": Entry(lambda s, b, h, q, kv: 3.0 * torch.tanh(s / 3.0)),
        "learned_cap": Entry(lambda s, b, h, q, kv: cap * torch.tanh(s / cap), None, (cap,)),
        "relative": Entry(lambda s, b, h, q, kv: s + relative[h, q - kv + N_K], None, (relative,)),
        "relative_clamped": Entry(
            lambda s, b, h, q, kv: s + relative[h, torch.clamp(q - kv, -8, 8) + 8], causal, (relative,)
        ),
        "graph_edges": Entry(lambda s, b, h, q, kv: s + edges[b, q, kv], None, (edges,)),
        "temperature": Entry(lambda s, b, h, q, kv: s * scale_q[b, q], causal, (scale_q,)),
        "kinds": Entry(lambda s, b, h, q, kv: s + kind_bias[kinds[kv], h], None, (kind_bias,)),
        "sandwich": Entry(lambda s, b, h, q, kv: s + 0.1 * torch.cos((q - kv) / 10.0) * (h + 1)),
        "masked_by_score": Entry(lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf"))),
        "masked_nan": Entry(lambda s, b, h, q, kv: s + torch.sqrt((q - kv) * 1.0) * learned, causal, (learned,)),
        "undo_softmax": Entry(lambda s, b, h, q, kv: torch.log(torch.relu(s) + 1e-3)),
        "constant": Entry(lambda s, b, h, q, kv: 0.01 * (q + kv)),
        "mixed": Entry(mixed, None, (learned, cap)),
    }  # fmt: skip


def arrays(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Return q, k, v and dout, with grouped heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N_Q, HEADS, 16), (N_K, HEADS // 2, 16), (N_K, HEADS // 2, 24), (N_Q, HEADS, 24))
    return tuple(torch.randn(BATCH, *shape, generator=generator).to(dtype) for shape in shapes)


def dense(q: Any, k: Any, v: Any, entry: Entry) -> tuple[Any, Any]:
    """Return (out, lse) from the whole score matrix, in float64 by torch; differentiable."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    b, h, i, j = (
        torch.arange(size).reshape([-1 if one == axis else 1 for one in range(4)])
        for axis, size in enumerate((q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    )
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = torch.ones_like(s, dtype=torch.bool)
    if entry.mask_mod is not None:
        seen = entry.mask_mod(b, h, i, j).expand(s.shape)
    if entry.score_mod is not None:
        scored = entry.score_mod(s, b, h, i, j).expand(s.shape)
        if bool(scored.isnan().any()):  # at masked pairs, which must reach no gradient
            kept = entry.score_mod(s[seen], *(x.expand(s.shape)[seen] for x in (b, h, i, j)))
            scored = torch.full_like(s, -torch.inf).masked_scatter(seen, kept)
        s = scored
    s = s.masked_fill(~seen, -torch.inf)
    live = (s > -torch.inf).any(-1, keepdim=True)
    lse = torch.logsumexp(torch.where(live, s, 0.0), -1, keepdim=True)
    p = torch.where(live, torch.exp(s - lse), 0.0)
    return (p @ v).transpose(1, 2), torch.where(live, lse, -torch.inf)[..., 0]
