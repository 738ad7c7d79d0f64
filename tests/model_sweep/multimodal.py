"""Text with an image, a video or a sound in it, for models that replace special tokens by features."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model_sweep import checks
from model_sweep.inputs import Inputs, tokens
from model_sweep.signals import GUESSES, MOST_TRIES, VARIADIC, combinations, sizes_of
from model_sweep.verdicts import attempt

AROUND = 6  # tokens before and after the features; more than the padding


class Modality(NamedTuple):
    """A kind of features: the method that computes them, and the names of the token that they replace."""

    method: str
    token: tuple[str, ...]
    inputs: tuple[str, ...]


MODALITIES = {
    "image": Modality("get_image_features", ("image_token_id", "image_token_index"), ("pixel_values",)),
    "video": Modality("get_video_features", ("video_token_id", "video_token_index"), ("pixel_values_videos",)),
    "audio": Modality(
        "get_audio_features",
        ("audio_token_id", "audio_token_index"),
        ("input_features", "input_values", "audio_values"),
    ),
}
TYPES = ("mm_token_type_ids", "token_type_ids")


def guesses(model: Any, modality: str) -> Iterator[Inputs]:
    """Yield tokens with as many special ones among them as the model makes features."""
    kind = MODALITIES[modality]
    parameters = inspect.signature(model.forward).parameters
    token = special_token(model, kind)
    number = 1 + list(MODALITIES).index(modality)
    for values in signals(model, kind, parameters):
        count = features(model, kind.method, values) or named_in_error(
            model, insert(values, token, 1, number, parameters)
        )
        for each in dict.fromkeys(x for x in (count and count // 2, count, *other_counts(model)) if x):
            yield insert(values, token, each, number, parameters)


def takes(model: Any, kind: Modality) -> bool:
    """Tell whether the text of a model can have such features in it."""
    parameters = inspect.signature(model.forward).parameters
    return (
        special_token(model, kind) is not None
        and "input_ids" in parameters
        and any(x in parameters for x in kind.inputs)
    )


def special_token(model: Any, kind: Modality) -> int | None:
    return next((getattr(model.config, name) for name in kind.token if hasattr(model.config, name)), None)


def signals(model: Any, kind: Modality, parameters: Any) -> Iterator[dict[str, Any]]:
    """Yield likely images or sounds, with what describes their sizes."""
    first = next((name for name in kind.inputs if name in parameters), None)
    if first is None:
        return
    method = method_of(model, kind.method)
    wanted = inspect.signature(method).parameters if method else {}
    more = [key for key, x in wanted.items() if key != first and x.kind not in VARIADIC and key in GUESSES]
    sizes = sizes_of(model.config)
    for extra in dict.fromkeys([(), *((key,) for key in more), tuple(more)]):
        yield from itertools.islice(combinations([first, *extra], sizes, {}), MOST_TRIES)


def features(model: Any, method: str, values: dict[str, Any]) -> int | None:
    """Return how many features a batch of two has; None where the model does not accept the values."""
    try:
        with torch.no_grad():
            found = method_of(model, method)(**values)
    except Exception:
        return None
    found = getattr(found, "pooler_output", found)
    if found is None:
        return None
    parts = [found] if isinstance(found, Tensor) else list(found)
    return sum(x.numel() // x.shape[-1] for x in parts if isinstance(x, Tensor))


def method_of(model: Any, name: str) -> Any:
    """Return a method of the model or of the one in it that has no head."""
    return getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)


def named_in_error(model: Any, given: Inputs) -> int | None:
    """Return the number of features that the model's error names, if it raises one for one special token."""
    found = attempt(checks.dense, model, given)
    named = re.search(r"features:? (\d+)", str(found)) if isinstance(found, Exception) else None
    return int(named[1]) if named else None


def other_counts(model: Any) -> Iterator[int]:
    """Yield numbers of features that a configuration names."""
    for name in ("num_query_tokens", "image_seq_length", "mm_tokens_per_image", "num_image_tokens"):
        count = getattr(model.config, name, None)
        if isinstance(count, int) and 0 < count < 100:
            yield from (count, count * sizes_of(model.config).frames)


def insert(values: dict[str, Any], token: int, count: int, number: int, parameters: Any) -> Inputs:
    """Return tokens around `count` special ones, in each row; `number` is the type of those, if they have types."""
    special = torch.full((2, count), token)
    ids = torch.cat([tokens(2, AROUND), special, tokens(2, AROUND, seed=8)], 1)
    given = {"input_ids": ids, **values}
    given |= {name: (ids == token).long() * number for name in TYPES if name in parameters}
    if "qformer_input_ids" in parameters:
        given["qformer_input_ids"] = tokens(seed=6)
    masks = ("attention_mask",) if "attention_mask" in parameters else ()
    return Inputs(given, masks)
