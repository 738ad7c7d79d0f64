"""Torch tensors for tests: random values from a seed, by default in float64, and comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # of float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normally distributed values; a narrower dtype gets the float64 values, rounded."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return `normal` values that require a gradient."""
    return normal(*shape, seed=seed, dtype=dtype).requires_grad_()


def ints(*values: int) -> Tensor:
    """Return int32 values, as tables of lengths and pages are."""
    return torch.tensor(values, dtype=torch.int32)


def qkv(
    rows: int = 5,
    keys: int = 7,
    *,
    batch: int = 2,
    head_dim_v: int = 6,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> tuple[Tensor, ...]:
    """Return q, k and v of four query heads and two key heads, with head_dim 8."""
    shapes = ((batch, rows, 4, 8), (batch, keys, 2, 8), (batch, keys, 2, head_dim_v))
    return tuple(normal(*shape, seed=seed, dtype=dtype).requires_grad_(grad) for seed, shape in enumerate(shapes))


def close(got: Any, want: Any, **tolerance: float) -> None:
    """Check that two tensors, or two lists of tensors, are equal within the tolerance (default: float64's)."""
    torch.testing.assert_close(got, want, **(tolerance or TOLERANCE))
