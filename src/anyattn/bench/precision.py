"""Largest error against float64 at (1, 8, 512, 64), unit normal, ten seeds, on the same inputs for every provider."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from .providers import providers

SHAPE = (1, 512, 8, 64)  # (batch, seqlen, nheads, head_dim)
SEEDS = range(10)


def errors(dtype: str, causal: bool = False) -> dict[str, list[float]]:
    """Provider -> largest absolute error of each seed, on inputs rounded to `dtype`."""
    import torch

    found: dict[str, list[float]] = {}
    exact = providers()[-1]
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        q, k, v = (torch.from_numpy(rng.standard_normal(SHAPE)).to(getattr(torch, dtype)) for _ in range(3))
        want = exact.attend(q.double(), k.double(), v.double(), causal)
        for provider in providers():
            error = (provider.attend(q, k, v, causal).double() - want).abs().max()
            found.setdefault(provider.name, []).append(float(error))
    return found


def summary() -> list[dict[str, Any]]:
    """One row per dtype: the median over the seeds of every provider's largest error."""
    return [
        {"dtype": dtype, "errors": {name: median(values) for name, values in errors(dtype).items()}}
        for dtype in ("float32", "float16", "bfloat16")
    ]
