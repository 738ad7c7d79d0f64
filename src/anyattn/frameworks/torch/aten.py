"""Kernels for torch's own attention operators on a CPU, for torch.nn.attention's registry of flash implementations.

What Inductor compiles relies on the strides that torch's fakes promise: out like query, logsumexp (batch, seqlen_q,
nheads) in memory, gradients (batch, seqlen, nheads, head_dim) in memory.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...problem import Options
from .. import execute
from . import ops
from .adapter import adapter


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu: (output, logsumexp)."""
    arrays, options = _call(query, key, value, dropout_p, is_causal, attn_mask, scale)
    result, lse = execute.forward(adapter, arrays, options, None)
    result, lse = result.transpose(1, 2), lse.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty_like(query)
    return (result, lse) if out.stride() == result.stride() else (out.copy_(result), lse)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu_backward: (grad_query, grad_key, grad_value)."""
    arrays, options = _call(query, key, value, dropout_p, is_causal, attn_mask, scale)
    saved = (out.transpose(1, 2), logsumexp, grad_out.transpose(1, 2), None)
    saved = ops.contiguous_rows(saved, ("out", "lse", "dout", "dlse"))
    dq, dk, dv, _, _ = execute.backward(adapter, saved, arrays, options, None, want_dbias=False)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[ops.Arrays, Options]:
    if attn_mask is not None:  # additive by now, whatever the user gave
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        wide = torch.float64 if query.dtype is torch.float64 else torch.float32
        attn_mask = attn_mask if attn_mask.dtype in (query.dtype, wide) else attn_mask.to(wide)
    options = Options(scale, right=0 if is_causal else None, alignment="top-left", dropout_p=dropout_p)
    arrays = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, *[None] * 12)
    return ops.contiguous_rows(arrays), options


class Override:
    """Our kernels in place of torch's, until `remove`."""

    def __init__(self) -> None:
        self.library: Any = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch says that a kernel is overridden: the caller asked for it
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            self.library.impl("_scaled_dot_product_flash_attention_for_cpu", forward, "CPU")
            self.library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", backward, "CPU")

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None
