"""anyattn for ComfyUI.

The __init__.py of a custom node registers it, so that users can choose it by name:

    from anyattn.compat import comfyui
    comfyui.register()

Or use it for one model: `model_options["transformer_options"]["optimized_attention_override"] = comfyui.override`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..frameworks.torch_tools import dense
from ..scalars import integer
from ..sdpa import sdpa

# Arguments that ComfyUI passes to every attention function, and that do not affect the result.
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
    """Compute attention with ComfyUI's signature of an attention function.

    Args:
        q: (batch, seqlen_q, heads * head_dim); with skip_reshape (batch, heads, seqlen_q, head_dim).
        k: (batch, seqlen_k, heads * head_dim); with skip_reshape (batch, heads, seqlen_k, head_dim).
        v: (batch, seqlen_k, heads * head_dim_v); with skip_reshape (batch, heads, seqlen_k, head_dim_v).
        heads: number of query heads.
        mask: boolean (False masks a key) or added to the scores: (seqlen_q, seqlen_k), (batch, seqlen_q, seqlen_k) or
            (batch, heads, seqlen_q, seqlen_k).
        attn_precision: no effect, because scores and sums are float32 or better.
        skip_reshape: q, k and v have separate heads.
        skip_output_reshape: return separate heads.
        scale: default head_dim ** -0.5.
        enable_gqa: allow fewer KV heads than query heads.
        **kwargs: other keywords; those that would change the result raise TypeError.

    Returns:
        (batch, seqlen_q, heads * head_dim_v); with skip_output_reshape (batch, heads, seqlen_q, head_dim_v).
    """
    unknown = kwargs.keys() - _IGNORED
    if unknown:
        names = ", ".join(sorted(unknown))
        raise TypeError(f"{names} must not be passed, because anyattn would ignore it. Use ComfyUI's own attention.")
    q, k, v = dense("q", q), dense("k", k), dense("v", v)
    if not skip_reshape:
        heads = integer("heads", heads)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and dense("mask", mask).ndim == 3:
        mask = mask.unsqueeze(1)
    out: Tensor = sdpa(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def override(function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
    """Compute attention instead of the function that ComfyUI would call; for "optimized_attention_override".

    Args:
        function: the function that ComfyUI would call; it is not used.
        *arguments: positional arguments of `attention`.
        **keywords: keyword arguments of `attention`.
    """
    return attention(*arguments, **keywords)


def register(name: str = "anyattn") -> None:
    """Register `attention` with a running ComfyUI.

    Args:
        name: name under which users choose it.
    """
    from comfy.ldm.modules.attention import register_attention_function

    register_attention_function(name, attention)
