"""Quantisation of keys and values in torch operations, with the bits of `definition.quantised.quantise`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...definition.dtypes import DTYPES
from .adapter import TORCH_DTYPES

_SMALLEST = torch.finfo(torch.float32).tiny


def quantise(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Return x (..., dim) in a stored dtype, and its scales (...) in float32."""
    largest, kind = DTYPES[dtype].largest, TORCH_DTYPES[dtype]
    x = x.float()
    scale = x.abs().amax(-1) / largest
    scale = torch.where(scale < _SMALLEST, 0.0, scale)
    usable = torch.isfinite(scale) & (scale > 0)
    ratio = x / torch.where(usable, scale, 1.0).unsqueeze(-1)
    ratio = torch.where(usable.unsqueeze(-1), ratio.clamp(-largest, largest), 0.0)
    stored = ratio.round().to(kind) if kind is torch.int8 else ratio.to(kind)
    return stored, torch.where(torch.isfinite(scale), scale, torch.nan)
