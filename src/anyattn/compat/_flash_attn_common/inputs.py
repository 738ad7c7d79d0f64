"""Inputs that flash_attn 3 and 4 add to q, k and v: an absorbed second product (MLA), and fp8 values with scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...frameworks.torch_tools import dense
from .calls import attend, rows_of

FP8 = torch.float8_e4m3fn
Descales = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def attend_extended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qv: Tensor | None = None,
    descales: Descales = (None, None, None),
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of `attend` with scores scale * (q k^T + qv v^T), or with values x * descale.

    The descales of q, k and v are (batch, nheads_kv). Scores and out are linear in them, so they multiply q and out,
    and k and v are not changed. fp8 keys and values are read as they are stored, and out is bfloat16.
    """
    arguments.update({"scale": scale, "cu_seqlens_q": cu_seqlens_q})
    if qv is not None:
        if q.dtype is FP8 or any(x is not None for x in descales):
            raise ValueError("qv cannot be combined with fp8 inputs or descales. Convert the inputs to bfloat16.")
        q, k = absorbed(q, k, v, qv)
        return attend(q, k, v, **arguments)
    q, k, dtype = dense("q", q), dense("k", k), q.dtype
    if dtype is FP8:
        if not dtype == k.dtype == v.dtype:
            raise TypeError(f"q, k and v must have one dtype, got {dtype}, {k.dtype}, {v.dtype}. Convert them first.")
        return _attend_quantised(q, k, v, descales, cu_seqlens_q, arguments)
    for name, descale in zip(("q_descale", "k_descale"), descales[:2], strict=True):
        if descale is not None:
            q = (q * _per_row(name, descale, q, k.shape[-2], cu_seqlens_q)).to(q.dtype)
    out, lse = attend(q, k, v, **arguments)
    if descales[2] is not None:
        out = out * _per_row("v_descale", descales[2], out, k.shape[-2], cu_seqlens_q)
    return out.to(dtype), lse


def _attend_quantised(
    q: Tensor, k: Tensor, v: Tensor, descales: Descales, cu_seqlens_q: Tensor | None, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Compute fp8 attention with the descales as scales. q is exact in both dtypes."""
    for name, descale in zip(("q_descale", "k_descale", "v_descale"), descales, strict=True):
        if descale is not None:
            _per_row(name, descale, q, k.shape[-2], cu_seqlens_q)
    of_q, of_k, of_v = (1.0 if x is None else x for x in descales)
    wide = torch.float32 if q.device.type == "cpu" else torch.bfloat16
    out, lse = attend(q.to(wide), k, v, k_scale=of_q * of_k, v_scale=of_v, **arguments)
    return out.to(torch.bfloat16), lse


def absorbed(q: Tensor, k: Tensor, v: Tensor, qv: Tensor) -> tuple[Tensor, Tensor]:
    """Return (q, k) whose products are q k^T + qv v^T, concatenated along head_dim.

    The default scale uses both sizes.
    """
    if qv.shape != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(f"qv must have q's shape with v's head_dim, got {tuple(qv.shape)} for q {tuple(q.shape)}.")
    return torch.cat((q, qv), -1), torch.cat((k, v), -1)


def _per_row(name: str, descale: Tensor, x: Tensor, nheads_kv: int, cu_seqlens: Tensor | None) -> Tensor:
    """Return the factors of x (batch, seqlen, nheads, head_dim) or, packed, (total, nheads, head_dim)."""
    if dense(name, descale).device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the tensor that it scales, got {descale.device}.")
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if descale.shape != (batch, nheads_kv):
        raise ValueError(f"{name} must be (batch, nheads_kv) = ({batch}, {nheads_kv}), got {tuple(descale.shape)}.")
    heads = descale.repeat_interleave(x.shape[-2] // nheads_kv, dim=1)
    if cu_seqlens is None:
        return heads[:, None, :, None]
    return heads[rows_of(cu_seqlens, x.shape[0])[0]].unsqueeze(-1)
