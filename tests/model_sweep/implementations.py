"""The attention implementations that are compared, and how often "anyattn" is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OURS = "anyattn"
DULL = "dull"  # halves every score: a model whose results do not notice that cannot show a fault
CALLS, DULL_CALLS = [0], [0]


def register() -> Callable[..., Any]:
    """Register the implementations; "anyattn" counts its calls from now on. Return what it was before."""
    from transformers import AttentionInterface, masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import anyattn.compat.transformers  # noqa: F401  registers "anyattn"

    ours = ALL_ATTENTION_FUNCTIONS[OURS]

    def counted(*arguments: Any, **options: Any) -> Any:
        CALLS[0] += 1
        return ours(*arguments, **options)

    AttentionInterface.register(OURS, counted)
    AttentionInterface.register(DULL, dull)
    masking_utils.AttentionMaskInterface.register(DULL, masking_utils.eager_mask)
    return ours


def dull(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **options: Any
) -> Any:
    """Compute attention with half the scores, from the mask of "eager"."""
    DULL_CALLS[0] += 1
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * (scale / 2)
    if isinstance(attention_mask, torch.Tensor):
        scores = scores + attention_mask[..., : key.shape[-2]]
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None
