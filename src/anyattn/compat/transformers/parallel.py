"""Models of transformers over several processes: every process computes its part of the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ... import distributed
from ...distributed.request import find_ranks
from .lazy_mask import LazyMask
from .refuse import NAME

IGNORED = -100  # label without a loss
KEYS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch")
LAYERS = {"full_attention", "sliding_attention"}


class Context(NamedTuple):
    """Division of the sequence in a block of `context_parallel`."""

    group: Any
    sharding: distributed.Sharding
    schedule: str
    visible: Tensor | None  # bool (batch, 1, 1, seqlen): False masks a padding token
    cu_seqlens: Tensor | None  # of the documents of a packed row


_contexts: list[Context] = []  # the one that is active, if any


def active() -> Context | None:
    """Return the context of the block that the program is in."""
    return _contexts[-1] if _contexts else None


@contextmanager
def context_parallel(
    model: Any,
    batch: Mapping[str, Any],
    *,
    sharding: str | distributed.Sharding = "zigzag",
    group: Any = None,
    schedule: str = "auto",
) -> Iterator[dict[str, Any]]:
    """Compute the model's attention over the ranks of a group in the block. Yield this rank's part of a batch.

    Every rank passes the whole batch. `model(**part)` computes the logits of the rank's tokens, and `loss` is their
    contribution: its sum over the ranks is the loss of one process. Gradients of parameters are contributions too, so
    sum them over the group. Run the backward pass inside the block if the model uses gradient checkpointing.

    Args:
        model: a model with attn_implementation="anyattn", or DistributedDataParallel of one.
        batch: input_ids or inputs_embeds, and optionally attention_mask (batch, seqlen) of padding, position_ids
            (batch, seqlen), labels or shift_labels, and num_items_in_batch. Default of position_ids: 0, 1, 2, ...
            Positions that restart, without attention_mask, start a new document of a packed row.
        sharding: "zigzag", "contiguous", "striped", or a `Sharding` of the sequence.
        group: as for `anyattn.distributed.attention`.
        schedule: as for `anyattn.distributed.attention`.

    Yields:
        Keywords of the model: the rank's input_ids or inputs_embeds and position_ids, use_cache=False, and with labels
        the rank's labels, shift_labels and num_items_in_batch, the number of labels of the whole batch.

    Raises:
        NotImplementedError: a model or a batch whose results would differ from one process; the message names what.
        ValueError, RuntimeError: an argument is wrong, or blocks are nested.
    """
    if _contexts:
        raise RuntimeError("context_parallel must not be nested. Leave the outer block first.")
    _check_model(getattr(model, "module", model), batch)
    ranks = find_ranks(group, schedule)
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        raise ValueError("batch must have input_ids or inputs_embeds, got neither.")
    positions, cu_seqlens = _positions(batch, tokens)
    if isinstance(sharding, str):
        sharding = _named(sharding, tokens.shape[1], ranks.size, cu_seqlens)
    mask = batch.get("attention_mask")
    visible = None if mask is None or bool((mask != 0).all()) else _padding(mask, tokens)
    part = {name: sharding.shard(x, ranks.rank) for name, x in _rows(batch, positions).items()}
    if "shift_labels" in part:
        part["labels"] = part["shift_labels"]
        part["num_items_in_batch"] = _items(batch)
    _contexts.append(Context(group, sharding, schedule, visible, cu_seqlens))
    try:
        yield part | {"use_cache": False}
    finally:
        _contexts.clear()


def attend(
    context: Context, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any], refused: dict[str, Any]
) -> Tensor:
    """Return out (batch, rows, nheads, head_dim_v) of the rank's queries over the whole sequence.

    refused: arguments of the attention function that must be None.
    """
    for name, x in refused.items():
        if x is not None and x is not False:
            raise NotImplementedError(f"{name} must be None in context_parallel, got a value. Use one process.")
    if not isinstance(mask, LazyMask) or mask.is_dense or mask.pattern.offset:
        raise NotImplementedError(
            "attention_mask must be causal, bidirectional or a sliding window in context_parallel, got another mask. "
            "Use one process."
        )
    given = {"window": mask.pattern[:2], "group": context.group, "sharding": context.sharding}
    given |= {"schedule": context.schedule, **options}
    if context.cu_seqlens is not None:
        table = context.cu_seqlens
        out: Tensor = distributed.attention_varlen(q[0], k[0], v[0], table, table, **given)[None]
    else:
        out = distributed.attention(q, k, v, mask=context.visible, **given)
    return out


def _check_model(model: Any, batch: Mapping[str, Any]) -> None:
    unknown = [name for name, x in batch.items() if name not in KEYS and x is not None]
    if unknown:
        raise NotImplementedError(f"batch must have only {', '.join(KEYS)}, got {', '.join(unknown)}. Use one process.")
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        raise ValueError(
            f"model must have attn_implementation='{NAME}', got {config._attn_implementation!r}. "
            f"Call model.set_attn_implementation('{NAME}')."
        )
    layers = set(getattr(config, "layer_types", None) or ()) - LAYERS
    reasons = {
        "is an encoder with a decoder": model.config.is_encoder_decoder,
        "has layers with a recurrent state": getattr(model, "_is_stateful", False),
        f"has layers of type {', '.join(sorted(layers))}": layers,
        "adds the loss of a router (output_router_logits)": getattr(config, "output_router_logits", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotImplementedError(
                f"model must treat each token alone outside attention, but {type(model).__name__} {reason}."
            )
    labelled = batch.get("labels") is not None or batch.get("shift_labels") is not None
    if labelled and getattr(model, "loss_type", None) != "ForCausalLM":
        raise NotImplementedError(
            f"labels must be None for {type(model).__name__}, whose loss may not be the sum of its tokens' losses. "
            "Compute the loss from the logits and the rank's labels (anyattn.distributed.shard)."
        )


def _positions(batch: Mapping[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return position_ids (batch, seqlen), and the cumulative lengths of packed documents."""
    rows, seqlen = tokens.shape[:2]
    given = batch.get("position_ids")
    if given is None:
        return torch.arange(seqlen, device=tokens.device).expand(rows, -1), None
    if given.ndim != 2 or given.shape[1] != seqlen or given.shape[0] not in (1, rows):
        raise ValueError(f"position_ids must be ({rows}, {seqlen}), got {tuple(given.shape)}.")
    starts = given.diff() != 1
    if batch.get("attention_mask") is not None or not bool(starts.any()):
        return given.expand(rows, -1), None
    if rows > 1:
        raise NotImplementedError(f"batch must have one row if its positions restart, got {rows}. Join the rows.")
    begins = pad(starts[0], (1, 0), value=True).nonzero().flatten()
    return given, pad(begins, (0, 1), value=seqlen).int()


def _padding(mask: Tensor, tokens: Tensor) -> Tensor:
    if mask.shape != tokens.shape[:2]:
        raise NotImplementedError(
            f"attention_mask must be (batch, seqlen) {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}. "
            "Masks of pairs are not divided over processes."
        )
    return (mask != 0)[:, None, None]


def _named(name: str, length: int, size: int, cu_seqlens: Tensor | None) -> distributed.Sharding:
    if name == "zigzag":
        return distributed.Sharding.zigzag(length, size, None if cu_seqlens is None else cu_seqlens.tolist())
    if name in ("contiguous", "striped"):
        found: distributed.Sharding = getattr(distributed.Sharding, name)(length, size)
        return found
    raise ValueError(f"sharding must be a Sharding, 'zigzag', 'contiguous' or 'striped', got {name!r}.")


def _rows(batch: Mapping[str, Any], positions: Tensor) -> dict[str, Tensor]:
    """Return the arrays of the whole batch that are divided by tokens."""
    found = {name: batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None}
    found["position_ids"] = positions
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    if shifted is not None:
        found["shift_labels"] = shifted
    elif labels is not None:
        found["shift_labels"] = pad(labels[:, 1:], (0, 1), value=IGNORED)
    return found


def _items(batch: Mapping[str, Any]) -> Any:
    """Return the number of labels of the whole batch."""
    given = batch.get("num_items_in_batch")
    if given is not None:
        return given
    shifted = batch.get("shift_labels")
    labels = batch["labels"][:, 1:] if shifted is None else shifted
    return (labels != IGNORED).sum()
