"""flash_attention module with block sizes and half precision, on every machine, with exact gradients.

Tensors are (batch, nheads, seqlen, head_dim). The block sizes Bc and Br are checked but have no effect, because the
backends choose their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import api, explicit
from ..scalars import integer

ROWS = 256  # rows of scores that are stored at a time for the row maxima


def flash_attention_forward(
    Q: Tensor, K: Tensor, V: Tensor, Bc: int = 32, Br: int = 32, use_half: bool = False, return_stats: bool = False
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute softmax(Q K^T / sqrt(head_dim)) V, differentiable.

    Args:
        Q: (batch, nheads, seqlen, head_dim).
        K: (batch, nheads, seqlen, head_dim).
        V: (batch, nheads, seqlen, head_dim).
        Bc: block size of the keys; no effect.
        Br: block size of the queries; no effect.
        use_half: compute in float16; the result has Q's dtype.
        return_stats: also return l and m.

    Returns:
        O, or (O, l, m): m_i = max_j s_ij of the scaled scores and l_i = sum_j exp(s_ij - m_i), both (batch, nheads,
        seqlen) and float32 (float64 for float64), without gradients. `flash_attention_backward` needs them.

    >>> import torch
    >>> x = torch.ones(1, 2, 16, 8)
    >>> O, l, m = flash_attention_forward(x, x, x, return_stats=True)
    >>> O.shape, l.shape, round(float(l[0, 0, 0]), 3)
    (torch.Size([1, 2, 16, 8]), torch.Size([1, 2, 16]), 16.0)
    """
    _check_blocks(Bc, Br)
    q, k, v = _rows(use_half, Q, K, V)
    out, lse = api.attention(q, k, v, return_lse=True)
    O: Tensor = out.transpose(1, 2).to(Q.dtype)
    if not return_stats:
        return O
    with torch.no_grad():
        m = _row_maxima(q.transpose(1, 2), k.transpose(1, 2)).to(lse.dtype)
        return O, torch.where(m == -torch.inf, 0.0, torch.exp(lse.detach() - m)), m


def flash_attention_backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,
    dO: Tensor,
    l: Tensor,
    m: Tensor,
    Bc: int = 32,
    Br: int = 32,
    use_half: bool = False,
) -> list[Tensor]:
    """Compute [dQ, dK, dV], the gradients of sum(O * dO).

    The arguments are those and the results of `flash_attention_forward(..., return_stats=True)`.

    Args:
        Q: (batch, nheads, seqlen, head_dim).
        K: (batch, nheads, seqlen, head_dim).
        V: (batch, nheads, seqlen, head_dim).
        O: result of the forward pass.
        dO: gradient of O.
        l: of the forward pass.
        m: of the forward pass.
        Bc: block size of the keys; no effect.
        Br: block size of the queries; no effect.
        use_half: compute in float16; the result has Q's dtype.

    Returns:
        [dQ, dK, dV], in the shapes of Q, K and V.

    >>> import torch
    >>> x = torch.ones(1, 2, 16, 8)
    >>> O, l, m = flash_attention_forward(x, x, x, return_stats=True)
    >>> [grad.shape for grad in flash_attention_backward(x, x, x, O, O, l, m)][0]
    torch.Size([1, 2, 16, 8])
    """
    _check_blocks(Bc, Br)
    q, k, v, out, dout = _rows(use_half, Q, K, V, O, dO)
    grads = explicit.attention_backward(dout, q, k, v, out, (m + torch.log(l)).contiguous())
    return [grad.transpose(1, 2).to(Q.dtype) for grad in grads[:3]]


def _check_blocks(Bc: int, Br: int) -> None:
    for name, size in (("Bc", Bc), ("Br", Br)):
        if integer(name, size) < 1:
            raise ValueError(f"{name} must be a block size >= 1, got {size}.")


def _rows(use_half: bool, *tensors: Tensor) -> list[Tensor]:
    """Return the tensors as (batch, seqlen, nheads, head_dim)."""
    for name, x in zip(("Q", "K", "V", "O", "dO"), tensors, strict=False):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (batch, nheads, seqlen, head_dim), got {tuple(x.shape)}.")
    return [(x.half() if use_half else x).transpose(1, 2) for x in tensors]


def _row_maxima(q: Tensor, k: Tensor) -> Tensor:
    """Return max_j of the scaled scores, (batch, nheads, seqlen), in O(seqlen) memory."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    if k.shape[2] == 0:
        return q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    keys = k.to(wide).transpose(-1, -2)
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
    blocks = [(rows.to(wide) @ keys).amax(-1) for rows in q.split(ROWS, dim=2)]
    scale: float = q.shape[-1] ** -0.5
    return torch.cat(blocks, -1) * scale
