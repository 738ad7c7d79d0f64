"""Masks for transformers' models: the pattern of a known mask function, without an entry per score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from . import parallel
from .lazy_mask import LazyMask, Pattern

MaskFunction = Callable[..., Any]


class Shape(NamedTuple):
    """Keys that a mask function makes visible: a distance before and after the query, in its own segment."""

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
    dtype: torch.dtype = torch.float32,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of eager attention, (batch_size, 1, q_length, kv_length) in `dtype`, or None like eager.

    transformers calls this function. The mask is a `LazyMask` if `mask_function` is causal, bidirectional, a sliding
    window, or packed sequences of these. It is dense for other functions, while a graph is traced, and if the caller
    needs an array (`allow_is_causal_skip=False` for a cache of fixed size, whose decoding is compiled).
    """
    function = masking_utils.causal_mask_function if mask_function is None else mask_function
    divided = parallel.active() is not None
    tracing = is_tracing(attention_mask)
    if not tracing:  # a static cache changes its tensor in place, but a LazyMask may be read later
        q_offset = int(q_offset)

    def compute() -> Any:
        return masking_utils.eager_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            function,
            attention_mask,
            dtype=dtype,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            local_size=local_size,
            device=device,
            **kwargs,
        )

    shape = None if tracing else _recognize(function)
    if divided:
        if shape is None or attention_mask is not None or q_length != kv_length:
            raise NotImplementedError(
                "the mask of a model must be causal, bidirectional or a sliding window in context_parallel, without a "
                "cache and outside torch.compile. Use one process."
            )
        pattern = Pattern(shape.left, shape.right)  # positions and documents are those of the whole sequence
        return LazyMask((batch_size, 1, q_length, kv_length), dtype, device, pattern, compute)
    lazy_is_wanted = allow_is_causal_skip or allow_is_bidirectional_skip
    if shape is None or not (lazy_is_wanted or shape.segments is not None):
        dense: Tensor | None = compute()
        return dense
    offset = int(q_offset) - kv_offset
    padding = _padding(attention_mask, kv_offset, kv_length, shape.right, offset + q_length)
    is_whole = local_size is None or kv_length < local_size
    if allow_is_bidirectional_skip and padding is None and is_whole:
        return None
    cu_seqlens = None if shape.segments is None else _cumulative(shape.segments.diff() != 0)
    pattern = Pattern(shape.left, shape.right, offset, padding, cu_seqlens)
    return LazyMask((batch_size, 1, q_length, kv_length), dtype, device, pattern, compute)


def _padding(
    attention_mask: Tensor | None, kv_offset: int, kv_length: int, right: int | None, end: int
) -> Tensor | None:
    """Return the part of the 2-D mask that covers the keys, or None if it masks no key that a query can reach."""
    if attention_mask is None:
        return None
    missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
    padding = pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length].bool()
    in_reach = padding if right is None else padding[:, : end + right]
    return None if bool(in_reach.all()) else padding


def _cumulative(starts: Tensor) -> Tensor:
    """Return cu_seqlens. starts (batch, seqlen - 1): True if the next token starts a sequence. Each row starts one."""
    begins = pad(starts, (1, 0), value=True).flatten().nonzero().flatten()
    return pad(begins, (0, 1), value=starts.shape[0] * (starts.shape[1] + 1)).int()


def _recognize(function: MaskFunction) -> Shape | None:
    """Return the shape of a transformers mask function, from its name and the values it encloses; None if unknown."""
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
    if maker == "remap_positions_for_packed_sequence":  # distances inside a sequence do not change
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
