"""Masks for transformers' models: what a mask function does, if it is one that is known, instead of every entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    # of the module itself: torch 2.9 compiles no import from the lazy one above it
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    found = None if torch.compiler.is_compiling() else _recognize(function)
    if found is None or not (allow_is_causal_skip or allow_is_bidirectional_skip or found.segments is not None):
        dense: Tensor | None = sdpa_mask(
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
    begins = None if segments is None else cumulative(segments.diff() != 0)
    setattr(padding, ATTRIBUTE, Pattern(left, right, offset, padded, begins, begins))
    return padding


def cumulative(starts: Tensor) -> Tensor:
    """cu_seqlens from (batch, seqlen - 1): whether a sequence starts at the next row. Each row 0 starts one."""
    begins = pad(starts, (1, 0), value=True).flatten().nonzero().flatten()
    return pad(begins, (0, 1), value=starts.shape[0] * (starts.shape[1] + 1)).int()


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
