"""anyattn for ComfyUI.

A custom node's __init__.py registers it, so that it can be chosen by its name,

    from anyattn.compat import comfyui
    comfyui.register()

or gives it to one model: `model_options["transformer_options"]["optimized_attention_override"] = comfyui.override`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..frameworks.torch_tools import dense
from ..scalars import integer
from ..sdpa import sdpa

# What ComfyUI hands to every attention function, none of it about the result.
_IGNORED = {"transformer_options", "low_precision_attention", "preferred_attention", "_inside_attn_wrapper"}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **kwargs: Any,
) -> Tensor:
    """ComfyUI's signature of an attention function.

    Args:
        q, k, v: (batch, seqlen, heads * head_dim); with skip_reshape (batch, heads, seqlen, head_dim).
        mask: boolean (True: takes part) or added to the scores: (seqlen_q, seqlen_k), (batch, seqlen_q, seqlen_k) or
            (batch, heads, seqlen_q, seqlen_k).
        attn_precision: without effect: scores and sums are float32 or better.

    Returns:
        (batch, seqlen, heads * head_dim_v); with skip_output_reshape (batch, heads, seqlen, head_dim_v).
    """
    unknown = kwargs.keys() - _IGNORED
    if unknown:
        raise TypeError(f"unknown arguments {sorted(unknown)}: what they ask for would not be done")
    q, k, v = dense("q", q), dense("k", k), dense("v", v)
    if not skip_reshape:
        heads = integer("heads", heads)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and dense("mask", mask).ndim == 3:
        mask = mask.unsqueeze(1)
    out: Tensor = sdpa(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def override(function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
    """For "optimized_attention_override": in place of the function that ComfyUI would have called."""
    return attention(*arguments, **keywords)


def register(name: str = "anyattn") -> None:
    """Registers `attention` with a running ComfyUI."""
    from comfy.ldm.modules.attention import register_attention_function

    register_attention_function(name, attention)
