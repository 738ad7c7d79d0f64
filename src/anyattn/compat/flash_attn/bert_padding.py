"""`flash_attn.bert_padding`: conversion between padded batches and packed rows, with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Return input[indices], rows of the first dimension."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return zeros (first_axis_dim, ...) with `values` at `indices`."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return (input[indices], input), for a residual connection around a computation on some rows."""
    return index_first_axis(input, indices), input.view_as(input)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Return the rows of a padded batch that the masks keep, as packed sequences.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or 0 and 1; True: in use.
        unused_mask: (batch, seqlen), bool or 0 and 1; True: kept, but not in use.

    Returns:
        (rows (total, ...), their indices (total,) in the flattened batch, cu_seqlens int32 (batch + 1,), max_seqlen,
        seqused int32 (batch,): number of rows in use per sequence).

    >>> import torch
    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(torch.ones(2, 3, 4), mask)
    >>> rows.shape, indices.tolist(), cu_seqlens.tolist(), max_seqlen, seqused.tolist()
    (torch.Size([5, 4]), [0, 1, 3, 4, 5], [0, 2, 5], 3, [2, 3])
    """
    used = attention_mask.bool()
    kept = used if unused_mask is None else used | unused_mask.bool()
    rows, indices, cu_seqlens, longest = _pack(hidden_states, kept, kept.sum(dim=-1, dtype=torch.int32))
    return rows, indices, cu_seqlens, longest, used.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return packed rows like `unpad_input`, for batch entries that hold several sequences each.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), integers: the lengths of an entry's sequences, then zeros.

    Returns:
        (rows (total, ...), indices (total,), cu_seqlens int32 (sequences + 1,), max_seqlen).

    >>> import torch
    >>> lengths = torch.tensor([[2, 1, 0, 0], [3, 0, 0, 0]])
    >>> unpad_input_for_concatenated_sequences(torch.ones(2, 4, 8), lengths)[1:]
    (tensor([0, 1, 2, 4, 5, 6]), tensor([0, 2, 3, 6], dtype=torch.int32), 3)
    """
    used = attention_mask_in_length.sum(dim=-1, keepdim=True)
    kept = torch.arange(attention_mask_in_length.shape[-1], device=used.device) < used
    return _pack(hidden_states, kept, attention_mask_in_length[attention_mask_in_length != 0])


def _pack(hidden_states: Tensor, kept: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    if kept.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask must be (batch, seqlen) {tuple(hidden_states.shape[:2])} like hidden_states, "
            f"got {tuple(kept.shape)}."
        )
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Return the padded batch (batch, seqlen, ...) of packed rows (total, ...), with zeros between the sequences.

    Args:
        hidden_states: packed rows (total, ...).
        indices: (total,), their indices in the flattened batch.
        batch: number of sequences.
        seqlen: padded length.

    >>> import torch
    >>> mask = torch.tensor([[True, False], [True, True]])
    >>> x = torch.ones(2, 2, 4)
    >>> rows, indices, *_ = unpad_input(x, mask)
    >>> torch.equal(pad_input(rows, indices, 2, 2), x * mask[:, :, None])
    True
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.reshape(batch, seqlen, *hidden_states.shape[1:])
