"""Inputs for any model: what its forward function asks for, in sizes that its configuration accepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_sweep.configurations import VOCABULARY

SEQLEN, DECODER_SEQLEN = 13, 11  # no other size has these numbers, so outputs tell which sequence they belong to
FIRST_TOKEN = 64  # ids of special tokens are smaller
PADDING = 4


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward call for a batch of two."""

    values: dict[str, Any]
    masks: tuple[str, ...] = ()  # the names of the masks that can name padding among the tokens

    def batch(self, count: int) -> Inputs:
        """Return the first rows of the batch of two alone; what has more rows than two has as many for each."""
        rows = {name: x[: len(x) * count // 2] if isinstance(x, Tensor) else x for name, x in self.values.items()}
        return replace(self, values=rows)

    def having(self, **values: Any) -> Inputs:
        return replace(self, values=self.values | values)


def tokens(batch: int = 2, seqlen: int = SEQLEN, seed: int = 1) -> Tensor:
    """Return ids that stand for nothing special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, VOCABULARY - 1, (batch, seqlen), generator=generator)


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(side: str, batch: int, seqlen: int) -> Tensor:
    """Return a mask whose first row is padded at one side; with "" no row is."""
    mask = torch.ones(batch, seqlen, dtype=torch.long)
    if side:
        mask[0, slice(0, PADDING) if side == "left" else slice(seqlen - PADDING, seqlen)] = 0
    return mask


def guesses(model: Any) -> Iterator[Inputs]:
    """Yield inputs that the model may accept, the likeliest first."""
    from model_sweep import signals, special

    made = special.MADE.get(model.config.model_type)
    if made is not None:
        yield Inputs(made(model.config))
    parameters = inspect.signature(model.forward).parameters
    name = model.main_input_name
    name = name if isinstance(name, str) else name[0]
    if "input_ids" in parameters:
        yield from texts(model, parameters)
    yield from signals.guesses(model, name, parameters)


def texts(model: Any, parameters: Any) -> Iterator[Inputs]:
    """Yield a batch of tokens, for a decoder too where there is one."""
    masks = ("attention_mask",) if "attention_mask" in parameters else ()
    values: dict[str, Any] = {"input_ids": tokens()}
    if "decoder_input_ids" in parameters and getattr(model.config, "is_encoder_decoder", False):
        values["decoder_input_ids"] = tokens(seqlen=DECODER_SEQLEN, seed=3)
        masks += ("decoder_attention_mask",) if "decoder_attention_mask" in parameters else ()
    if "bbox" in parameters:
        corners = torch.randint(0, 50, (2, SEQLEN, 4), generator=torch.Generator().manual_seed(4))
        corners[..., 2:] += corners[..., :2]
        values["bbox"] = corners
    yield Inputs(values, masks)
