"""A KV cache of int8 or float8 for transformers' models, read by attn_implementation="anyattn" as it is stored."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ...definition.dtypes import QUANTISED
from ...frameworks.torch_tools import quantise

_SCALE = "anyattn_scale"  # attribute of the keys and values that a layer returns


class QuantisedCache(Cache):  # type: ignore[misc]
    """KV cache of int8 or float8 with one scale per token and head, for `model.generate(past_key_values=...)`.

    Attention reads the cache as it is stored. The cache takes (head_dim + 4) / (2 head_dim) of the memory of a bfloat16
    cache. The model must have attn_implementation="anyattn", because other implementations cannot read the cache.

    Args:
        dtype: "int8", "float8_e4m3fn" or "float8_e5m2".

    >>> import torch, transformers
    >>> from anyattn.compat.transformers import QuantisedCache
    >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> config = transformers.LlamaConfig(vocab_size=16, attn_implementation="anyattn", **sizes)
    >>> model = transformers.LlamaForCausalLM(config).eval()
    >>> options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    >>> model.generate(torch.tensor([[1, 2, 3]]), past_key_values=QuantisedCache("int8"), **options).shape
    torch.Size([1, 7])
    """

    def __init__(self, dtype: str = "int8") -> None:
        if dtype not in QUANTISED:
            raise ValueError(f"dtype must be one of {', '.join(QUANTISED)}, got {dtype!r}.")
        layer: Any = partial(QuantisedLayer, dtype)
        super().__init__(layer_class_to_replicate=layer)


class QuantisedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer. Room for tokens grows by half, so that a new token copies no others."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.stored_dtype = dtype
        self._length = 0
        self._room: dict[str, Tensor] = {}  # keys, values (batch, slots, heads, dim), and their scales without dim

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, seqlen, head_dim); return all, quantised."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[2]
        for name, states in (("keys", key_states), ("values", value_states)):
            stored, scale = quantise(states.transpose(1, 2), self.stored_dtype)
            for label, new in ((name, stored), (f"{name}_scale", scale)):
                room = self._with_room(label, new, end)
                _bits(room)[:, self._length : end] = _bits(new)
        self._length = end
        self.keys, self.values = (self._view(name) for name in ("keys", "values"))
        return self.keys, self.values

    def _with_room(self, label: str, new: Tensor, end: int) -> Tensor:
        """Return memory of at least `end` slots, with the tokens so far."""
        old = self._room.get(label)
        if old is not None and old.shape[1] >= end:
            return old
        slots = max(end, 0 if old is None else old.shape[1] * 3 // 2)
        room = new.new_zeros((new.shape[0], slots, *new.shape[2:]))
        if old is not None:
            _bits(room)[:, : self._length] = _bits(old)[:, : self._length]
        self._room[label] = room
        return room

    def _view(self, name: str) -> Tensor:
        found = self._room[name][:, : self._length].transpose(1, 2)
        setattr(found, _SCALE, self._room[f"{name}_scale"][:, : self._length])
        return found

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self._length

    def reset(self) -> None:
        """Drop all tokens."""
        super().reset()
        self._length, self._room = 0, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; the number is negative."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be <= 0, got {tokens_to_remove}.")
        self._length = max(0, self._length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        batch = next((len(x) for x in self._room.values()), 0)
        self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        for label, x in self._room.items():
            self._room[label] = _bits(x)[indices.to(x.device)].view(x.dtype)


def _bits(x: Tensor) -> Tensor:
    """Return a view that every operation supports; float8 has few operations."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def scale_of(states: Tensor) -> Tensor | None:
    """Return the scales (batch, seqlen, heads) of keys or values from a `QuantisedCache`; None for others."""
    found: Tensor | None = getattr(states, _SCALE, None)
    return found
