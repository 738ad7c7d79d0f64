"""anyattn as an attention implementation of Hugging Face transformers 5.

    import anyattn.compat.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="anyattn")

Importing this module registers the name with transformers' two interfaces, for attention and for masks. A mask function
that is causal, bidirectional, a sliding window or packed sequences of these, as almost every model's is, is handed over
as a `Pattern` on a mask of two dimensions: no score-sized mask is made. Any other becomes the boolean mask that
transformers makes for SDPA, and so does every mask under torch.compile, where functions cannot be looked into.

Results are those of "eager", but for rows of padding, which no one reads, and for packed sequences (position_ids that
start anew): these are kept apart even where a cache was created, as transformers does for FlashAttention alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import api

MaskFunction = Callable[..., Any]
ATTRIBUTE = "anyattn_pattern"  # of the mask tensors that `mask` makes


class Pattern(NamedTuple):
    """Row i sees the keys j with offset + i - left <= j <= offset + i + right; None: unbounded."""

    left: int | None
    right: int | None
    offset: int
    padded: bool = False  # the mask itself hides keys
    cu_seqlens_q: Tensor | None = None  # packed: where sequences begin among the rows of the whole batch
    cu_seqlens_k: Tensor | None = None


class Shape(NamedTuple):
    """What a mask function lets a row see: keys at most so far before and after it, of its own segment."""

    left: int | None = None
    right: int | None = None
    segments: Tensor | None = None  # (batch, seqlen): number of the packed sequence


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (batch, nheads, seqlen_q, head_dim), out (batch, seqlen_q, nheads, head_dim_v).

    sliding_window counts the keys that a row sees, itself included; s_aux are the sinks; position_bias is added to the
    scores. There are no weights to return: output_attentions=True raises.
    """
    if kwargs.get("output_attentions"):
        raise ValueError('output_attentions=True needs attn_implementation="eager": the weights are never in memory')
    if kwargs.get("sinks") is not None:
        raise ValueError("sinks of more than one value per head are not supported: use attn_implementation='eager'")
    if kwargs.get("cache") is not None:
        raise ValueError("continuous batching has caches of its own: transformers accepts few implementations there")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sink": s_aux, "dropout_p": dropout}
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    pattern = _pattern(q, k, attention_mask, causal, sliding_window, kwargs)
    if pattern is not None and pattern.cu_seqlens_q is not None:
        if position_bias is not None:
            raise ValueError("position_bias cannot be combined with packed sequences")
        return _packed(q, k, v, pattern, options), None
    bias = position_bias
    if pattern is not None:
        options |= {"window": (pattern.left, pattern.right), "offset": pattern.offset}
        attention_mask = None if attention_mask is None or not pattern.padded else attention_mask[:, None, None]
    if attention_mask is not None and attention_mask.is_floating_point():
        bias, attention_mask = attention_mask if bias is None else bias + attention_mask, None
    return api.attention(q, k, v, bias=bias, mask=attention_mask, **options), None


def _pattern(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, sliding_window: int | None, kwargs: dict[str, Any]
) -> Pattern | None:
    """What the mask says; None: it is dense and says everything itself.

    A mask that is None or came without a Pattern means what it means to transformers' SDPA and FlashAttention: keys
    beyond the rows are the unused end of a static cache, but for a single row, which sees them all.
    """
    found: Pattern | None = getattr(mask, ATTRIBUTE, None)
    if found is None and mask is not None and mask.ndim != 2:
        return None
    if found is None:
        behind = k.shape[1] - q.shape[1]
        causal = causal and q.shape[1] > 1
        left = None if sliding_window is None else sliding_window - 1
        found = Pattern(left, 0 if causal else left, 0 if causal and mask is None else behind, mask is not None)
    if found.padded or found.cu_seqlens_q is not None:
        return found
    begins_q, begins_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if begins_q is None or begins_k is None:
        begins_q = begins_k = _begins(kwargs.get("position_ids"), q, k)
    return found._replace(cu_seqlens_q=begins_q, cu_seqlens_k=begins_k)


def _begins(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """cu_seqlens of position_ids that start anew inside a batch of one, or None."""
    if torch.compiler.is_compiling() or position_ids is None or q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        return None
    if position_ids.shape != q.shape[:2]:
        return None
    starts = position_ids[0].diff() != 1
    return _cumulative(starts[None]) if bool(starts.any()) else None


def _cumulative(starts: Tensor) -> Tensor:
    """cu_seqlens from (batch, seqlen - 1): whether a sequence starts at the next row. Each row 0 starts one."""
    begins = pad(starts, (1, 0), value=True).flatten().nonzero().flatten()
    return pad(begins, (0, 1), value=starts.shape[0] * (starts.shape[1] + 1)).int()


def _packed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: dict[str, Any]) -> Tensor:
    arrays = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), pattern.cu_seqlens_q, pattern.cu_seqlens_k)
    out: Tensor = api.attention_varlen(*arrays, window=(pattern.left, pattern.right), **options)
    return out.reshape(*q.shape[:2], *out.shape[1:])


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """What models ask for a mask: None, the padding (batch, kv_length) with a Pattern, or a dense boolean mask."""
    from transformers import masking_utils

    function = mask_function or masking_utils.causal_mask_function
    found = None if torch.compiler.is_compiling() else _recognize(function)
    if found is None or not (allow_is_causal_skip or allow_is_bidirectional_skip or found.segments is not None):
        dense: Tensor | None = masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            function,
            attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
        return dense
    left, right, segments = found
    offset = int(q_offset) - kv_offset
    padding, device = attention_mask, kwargs.get("device", "cpu")
    if padding is None:
        padding = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        missing = max(kv_offset + kv_length - padding.shape[1], 0)
        padding = pad(padding, (0, missing))[:, kv_offset : kv_offset + kv_length]
    in_reach = padding if right is None else padding[:, : offset + q_length + right]
    padded = attention_mask is not None and not bool(in_reach.all())
    whole = kv_length == offset + q_length and (offset == 0 or q_length == 1)
    if not padded and segments is None and left is None and (right is None or whole):
        return None
    begins = None if segments is None else _cumulative(segments.diff() != 0)
    setattr(padding, ATTRIBUTE, Pattern(left, right, offset, padded, begins, begins))
    return padding


def _recognize(function: MaskFunction) -> Shape | None:
    """What a mask function of transformers does, by its name and what it encloses; None: something else."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return Shape(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return Shape()
    if function.__module__ != masking_utils.__name__ or function.__closure__ is None:
        return None
    names = function.__code__.co_freevars
    enclosed = {name: cell.cell_contents for name, cell in zip(names, function.__closure__, strict=True)}
    maker = function.__qualname__.split(".")[0]
    if maker == "sliding_window_overlay":
        return Shape(left=enclosed["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return Shape(enclosed["sliding_window"], enclosed["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return Shape(segments=enclosed["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":  # inside a sequence distances stay as they are
        return _recognize(enclosed["mask_function"])
    if maker == "and_masks":
        return _intersect([_recognize(part) for part in enclosed["mask_functions"]])
    return None


def _intersect(parts: list[Shape | None]) -> Shape | None:
    known = [part for part in parts if part is not None]
    segments = [part.segments for part in known if part.segments is not None]
    if len(known) < len(parts) or len(segments) > 1:
        return None
    left = min((part.left for part in known if part.left is not None), default=None)
    right = min((part.right for part in known if part.right is not None), default=None)
    return Shape(left, right, segments[0] if segments else None)


def register() -> None:
    """Registers "anyattn"; done when this module is imported."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("anyattn", attention)
    AttentionMaskInterface.register("anyattn", mask)


register()
