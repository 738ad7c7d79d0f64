"""Attention function for transformers' models."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import output_capturing
from transformers.utils.generic import TransformersKwargs

from ... import api
from ...weights import attention_weights
from . import parallel
from .lazy_mask import LazyMask, Pattern
from .quantised_cache import scale_of
from .selected_keys import key_mask, selected_keys

USE_EAGER = "Use attn_implementation='eager' or 'sdpa' for this model."


class Visible(NamedTuple):
    """Keys that each query attends to, as arguments of anyattn.attention. cu_seqlens_q: of packed sequences."""

    window: tuple[int | None, int | None] = (None, None)
    offset: int | None = None
    mask: Tensor | None = None  # bool
    bias: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute (out, weights) of eager attention. transformers' attention modules call this function.

    The mask alone decides which keys a query attends to, as in eager attention. None masks nothing. `is_causal` and
    `sliding_window` are not read, because the mask contains both.

    Args:
        module: the attention module that calls this function.
        query: (batch, nheads, seqlen_q, head_dim).
        key: (batch, nheads_kv, seqlen_k, head_dim), or what a `QuantisedCache` returns.
        value: (batch, nheads_kv, seqlen_k, head_dim_v).
        attention_mask: a `LazyMask`; a boolean mask (True: visible) with four dimensions; or a floating-point mask,
            which is added to the scores and broadcast.
        dropout: probability, applied while the module is in training mode.
        scaling: default head_dim ** -0.5.
        is_causal: not read, because the mask contains it.
        sliding_window: not read, because the mask contains it.
        softcap: 0 or None: off.
        s_aux: one sink logit per head.
        position_bias: added to the scores.
        sinks: one sink logit per query, broadcastable to (batch, nheads, seqlen_q, 1).
        indices: (batch, seqlen_q, n), keys that an indexer chose for each query (DeepSeek-V3.2). The mask applies too.
        block_indices: (batch, heads, seqlen_q, n), chosen blocks of `module.indexer.block_size` keys; -1: no block.
        cu_seq_lens_q: int32 (sequences + 1,). With cu_seq_lens_k, the batch of one holds packed sequences.
        cu_seq_lens_k: int32 (sequences + 1,).
        output_attentions: also return the weights, (batch, nheads, seqlen_q, seqlen_k), in O(seqlen^2) memory.
        **kwargs: other keywords; those that could change the result raise NotImplementedError.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v), and the weights or None.

    Raises:
        NotImplementedError: an unknown argument is not None, because it could change the result.
        ValueError: a mask or a combination of arguments that eager attention does not define.
    """
    _refuse_unknown(module, kwargs)
    context = parallel.active()
    if context is None:
        _warn_of_positions(module, attention_mask, kwargs.get("position_ids"), cu_seq_lens_q)
    batch = max(x.shape[0] for x in (query, key, value))
    scales = {"k_scale": scale_of(key), "v_scale": scale_of(value)}
    q, k, v = (_expanded(x, batch).transpose(1, 2) for x in (query, key, value))
    wants_weights = bool(output_attentions) or _weights_are_recorded()
    dropout_p = dropout if getattr(module, "training", True) else 0.0
    if wants_weights and dropout_p:
        raise ValueError(f"output_attentions=True cannot be combined with dropout, got {dropout}. Call model.eval().")
    if wants_weights and scales["k_scale"] is not None:
        raise ValueError("output_attentions must be False with a QuantisedCache, got True. Use another cache.")
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sink": s_aux}
    if context is not None:
        refused: dict[str, Any] = {"position_bias": position_bias, "sinks": sinks, "indices": indices}
        refused |= {"block_indices": block_indices, "cu_seq_lens_q": cu_seq_lens_q, "output_attentions": wants_weights}
        refused |= scales
        options["dropout_p"] = dropout_p
        return parallel.attend(context, q, k, v, attention_mask, options, refused), None
    chosen = selected_keys(module, indices, block_indices, k)
    as_mask_alone = wants_weights or any(x is not None for x in (position_bias, sinks, chosen))
    visible = _visible(attention_mask, (q.shape[1], k.shape[1]), cu_seq_lens_q, cu_seq_lens_k, as_mask_alone)
    if visible.cu_seqlens_q is not None:
        return _packed(q, k, v, visible, {**options, "dropout_p": dropout_p}), None
    options |= {"window": visible.window, "offset": visible.offset, "mask": visible.mask}
    options["bias"] = _sum(visible.bias, position_bias, q.dtype)
    if chosen is not None and q.device.type != "cpu":  # other backends do not support selected keys
        options["mask"] = key_mask(chosen, q.shape[2], k.shape[1], visible.mask)
    elif chosen is not None:
        options["kv_indices"] = chosen
    if scales["k_scale"] is not None:
        options |= scales
    if sinks is None and not wants_weights:
        return api.attention(q, k, v, dropout_p=dropout_p, **options), None
    return _with_lse(q, k, v, sinks, wants_weights, dropout_p, options)


def _with_lse(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, wants_weights: bool, dropout_p: float, options: Any
) -> tuple[Tensor, Tensor | None]:
    """Return (out, weights) in the cases that need the logsumexp: weights, and sinks that differ between queries.

    A sink adds exp(sink) to the sum of a query, so its weights are multiplied by sigmoid(lse - sink).
    """
    out, lse = api.attention(q, k, v, dropout_p=dropout_p, return_lse=True, **options)
    weights = attention_weights(q, k, lse, **options) if wants_weights else None
    if sinks is not None:
        kept = torch.sigmoid(lse.unsqueeze(-1) - sinks.float()).to(out.dtype)
        out, weights = out * kept.transpose(1, 2), None if weights is None else weights * kept
    return out, weights


def _expanded(x: Tensor, batch: int) -> Tensor:
    """Return x expanded to this batch size, because one sequence of learned queries is used for every item."""
    return x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x


def _sum(bias: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is not None and position_bias is not None:
        bias = bias + position_bias
    else:
        bias = position_bias if bias is None else bias
    return bias if bias is None or bias.dtype in (dtype, torch.float32) else bias.float()


def _visible(
    mask: Tensor | None,
    lengths: tuple[int, int],
    begins_q: Tensor | None,
    begins_k: Tensor | None,
    as_mask_alone: bool,
) -> Visible:
    """Return the visible keys of the mask. as_mask_alone: packed sequences become a mask too."""
    if begins_q is not None and as_mask_alone:
        raise ValueError(
            "cu_seq_lens_q cannot be combined with output_attentions, position_bias, sinks or selected keys. Pass "
            "position_ids and use_cache=False instead."
        )
    if isinstance(mask, LazyMask):
        if mask.is_dense or mask.shape[2:] != lengths or (as_mask_alone and mask.pattern.cu_seqlens is not None):
            mask = mask.dense()
        else:
            return _from_pattern(mask.pattern, begins_q, begins_k)
    if begins_q is not None and mask is not None:
        raise ValueError("cu_seq_lens_q cannot be combined with a dense attention_mask. Pass one of them.")
    if begins_q is not None:
        return Visible(cu_seqlens_q=begins_q, cu_seqlens_k=begins_k)
    if mask is None or mask.is_floating_point():
        return Visible(bias=mask)
    if mask.dtype == torch.bool and mask.ndim == 4:
        return Visible(mask=mask)
    raise ValueError(
        "attention_mask must be floating point, or boolean of 4 dimensions (batch, nheads or 1, seqlen_q, seqlen_k), "
        f"got {mask.dtype} of shape {tuple(mask.shape)}."
    )


def _from_pattern(pattern: Pattern, begins_q: Tensor | None, begins_k: Tensor | None) -> Visible:
    left, right, offset, padding, cu_seqlens = pattern
    if cu_seqlens is not None:
        return Visible((left, right), cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    if begins_q is None:
        return Visible((left, right), offset, None if padding is None else padding[:, None, None])
    if padding is None:
        return Visible((left, right), cu_seqlens_q=begins_q, cu_seqlens_k=begins_k)
    raise ValueError("cu_seq_lens_q cannot be combined with padding in attention_mask. Remove the padding.")


def _packed(q: Tensor, k: Tensor, v: Tensor, visible: Visible, options: dict[str, Any]) -> Tensor:
    arrays: Any = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), visible.cu_seqlens_q, visible.cu_seqlens_k)
    out: Tensor = api.attention_varlen(*arrays, window=visible.window, **options)
    return out.reshape(*q.shape[:2], *out.shape[1:])


# Arguments of whole models and of generate that reach attention and do not change the result of eager attention.
NEUTRAL = {"cache_position", "deterministic", "grid_thw", "input_ids", "logits_to_keep", "position_embeddings"}
NEUTRAL |= {"return_dict", "shift_labels", "token_type_ids", "use_cache", *GenerationConfig().to_dict()}
NEUTRAL |= TransformersKwargs.__optional_keys__ | TransformersKwargs.__required_keys__


def _refuse_unknown(module: Any, arguments: dict[str, Any]) -> None:
    for name, x in arguments.items():
        if x is not None and name not in NEUTRAL:
            raise NotImplementedError(
                f"{type(module).__name__} passes {name}= to attention, which is not supported. {USE_EAGER}"
            )


def _warn_of_positions(module: Any, mask: Tensor | None, position_ids: Tensor | None, begins: Tensor | None) -> None:
    """Warn if positions restart and transformers does not report packed sequences, because FlashAttention would guess.

    Only the first layer checks, because reading the positions costs a synchronisation on a GPU.
    """
    if torch.compiler.is_compiling() or not isinstance(mask, LazyMask):
        return
    if mask.pattern.cu_seqlens is not None or begins is not None:
        return
    if position_ids is None or getattr(module, "layer_idx", None) != 0 or position_ids.shape != (1, mask.shape[-1]):
        return
    if bool((position_ids.diff() < 0).any()):
        warnings.warn(
            "position_ids restart, but the row is one sequence, as in eager attention, because the call has a cache or "
            "an attention_mask. For packed sequences pass use_cache=False and no attention_mask, or cu_seq_lens_q",
            stacklevel=2,
        )


def _weights_are_recorded() -> bool:
    """Return whether transformers' hooks collect the weights of this forward pass (output_attentions=True)."""
    collector = output_capturing._active_collector
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()  # as transformers does
    return collected is not None and any(name.endswith("attentions") for name in collected)
