"""Jobs of ranks: models of transformers that are divided over the processes of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compat import models

IGNORED = -100


def batch(form: str) -> dict[str, Any]:
    """Return a whole batch with labels: "plain", padded on a side, or "packed" documents in one row."""
    if form == "packed":
        tokens = models.tokens(batch=1, seqlen=23)
        positions = torch.cat([torch.arange(n) for n in (4, 9, 1, 9)])[None]
        labels = tokens.masked_fill(positions == 0, IGNORED)
        return {"input_ids": tokens, "position_ids": positions, "labels": labels}
    tokens = models.tokens(seqlen=models.SEQLEN)
    if form == "plain":
        return {"input_ids": tokens, "labels": tokens}
    mask = models.padding(form)
    labels = tokens.masked_fill((mask == 0) | (mask.roll(1, -1) == 0), IGNORED)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def differences(name: str, form: str, sharding: str, schedule: str) -> tuple[float, float]:
    """Return the differences of loss and gradients from one process, relative to a parameter's largest gradient."""
    from anyattn.compat.transformers import context_parallel

    model, given = models.built(name), batch(form)
    given_alone = {**given, "use_cache": False}
    wanted = models.gradients(model, "anyattn", **given_alone)
    model.train()
    want = model(**given_alone).loss.detach()
    model.zero_grad()
    with context_parallel(model, given, sharding=sharding, schedule=schedule) as part:
        loss = model(**part).loss
        loss.backward()
    model.eval()
    total = loss.detach()
    dist.all_reduce(total)
    largest = 0.0
    for key, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        value: Tensor | None = wanted.get(key)
        if value is not None:
            largest = max(largest, float((gradient - value).abs().max() / (value.abs().max() + 1e-3)))
    return float((total - want).abs()), largest


def refused(what: str) -> None:
    """Make a call that must raise an error."""
    from anyattn.compat.transformers import context_parallel

    names = {"encoder": "bert", "encoder-decoder": "t5"}
    model, given = models.built(names.get(what, "llama")), batch("plain")
    model.set_attn_implementation("sdpa" if what == "implementation" else "anyattn")
    changes = {
        "pixels": {"pixel_values": torch.ones(1)},
        "pairs": {"attention_mask": torch.ones(2, 1, models.SEQLEN, models.SEQLEN).tril()},
        "rows": {"position_ids": torch.arange(models.SEQLEN).remainder(5)[None].expand(2, -1)},
        "tokens": {"input_ids": None},
    }
    with context_parallel(model, {**given, **changes.get(what, {})}) as part:
        if what == "nested":
            with context_parallel(model, given):
                pass
        model(**part, **({"output_attentions": True} if what == "weights" else {}))
