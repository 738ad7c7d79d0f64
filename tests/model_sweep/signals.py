"""Inputs that are not text: images, videos, sounds, series, and hidden states.

The shape that a model wants follows from its configuration only in part. Each parameter has a list of likely values
here, and the sweep tries their combinations until eager accepts one.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from model_sweep.inputs import SEQLEN, Inputs, normal, texts, tokens

MOST_TRIES = 100
FRAMES = 40  # of sounds


class Sizes(NamedTuple):
    """The sizes that inputs depend on, as the configuration or an inner one has them."""

    width: int
    image: int
    channels: int
    patch: int
    temporal: int
    merge: int
    frames: int
    mels: int
    positions: int
    length: int
    other: int


NAMES = {
    "width": (("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "encoder_hidden_size"), 64),
    "image": (("image_size", "img_size", "input_image_size", "crop_size", "train_size"), 32),
    "channels": (("num_channels", "in_channels", "in_chans", "input_channels"), 3),
    "patch": (("patch_size", "spatial_patch_size"), 8),
    "temporal": (("temporal_patch_size", "patch_temporal", "tubelet_size"), 1),
    "merge": (("spatial_merge_size", "merge_size"), 2),
    "frames": (("num_frames", "frames_per_clip"), 4),
    "mels": (
        (
            "num_mel_bins",
            "n_mels",
            "mel_bins",
            "input_feat_size",
            "feature_size",
            "input_feat_per_channel",
            "input_dim",
            "model_in_dim",
            "mel_dim",
            "feature_projection_input_dim",
            "subsampling_input_dim",
        ),
        16,
    ),
    "positions": (("max_source_positions",), 32),
    "length": (("max_length", "context_length"), 64),
    "other": (("encoder_hidden_size", "cross_hidden_size"), 64),
}


def sizes_of(configuration: Any, prefer: tuple[str, ...] = ()) -> Sizes:
    return Sizes(**{key: find(configuration, names, default) for key, (names, default) in NAMES.items()})


def find(configuration: Any, names: tuple[str, ...], default: int) -> int:
    """Return the first of these values that the configuration or one inside it has."""
    waiting = [configuration]
    for one in waiting:
        for name in names:
            value = getattr(one, name, None) if name in dir(one) else None
            if isinstance(value, list | tuple) and value and isinstance(value[-1], int):
                value = value[-1]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        inner = sorted(getattr(one, "sub_configs", None) or (), key=lambda name: "text" in name)
        waiting += [getattr(one, name) for name in inner if getattr(one, name, None) is not None]
    return default


def images(s: Sizes) -> list[Any]:
    rows = (s.image // s.patch) ** 2
    flat = s.channels * s.patch**2
    return [
        normal(2, s.channels, s.image, s.image),
        normal(2, s.frames, s.channels, s.image, s.image),
        normal(2, 1, s.channels, s.image, s.image),
        normal(2, 3, s.channels, s.image, s.image),
        normal(2 * 16, flat * s.temporal),
        normal(2 * 16, flat),
        normal(2, rows, flat),
        normal(2, 16, flat),
        normal(2 * 16, s.channels, s.patch, s.patch),
        normal(1, 2 * 16, s.channels, s.patch, s.patch),
        normal(2 * 16, s.channels, s.temporal, s.patch, s.patch),
        normal(2, 2, s.channels, s.image, s.image),
        normal(2, s.channels, 64, 64),
        normal(2, s.channels, 96, 96),
        normal(2, s.channels, s.frames, s.image, s.image),
    ]


def sounds(s: Sizes) -> list[Any]:
    lengths = dict.fromkeys((FRAMES, 2 * s.positions, s.positions, 64, 128, 100))
    return [x for n in lengths for x in (normal(2, s.mels, n), normal(2, n, s.mels))] + [
        normal(2, FRAMES, 7 * s.mels),
        normal(2, 1, 64, s.mels),
        normal(2, 1, 1024, s.mels),
        normal(2, 1024, s.mels),
    ]


def waves(s: Sizes) -> list[Any]:
    return [
        normal(2, 800),
        normal(2, 1, 800),
        normal(2, s.length, s.mels),
        normal(2, 1920),
        normal(2, 8000),
        normal(2, 1, 9600),
        normal(2, 1, 1920),
        normal(2, 1, 3840),
        normal(2, 40, s.mels),
        normal(2, 1024, s.mels),
    ]


def states(s: Sizes) -> list[Any]:
    flat = s.channels * s.patch**2
    return [
        normal(2, SEQLEN, s.width),
        normal(32, flat * s.temporal),
        normal(32, flat),
        normal(2, 16, s.width),
        normal(32, s.width),
        normal(2, s.width, SEQLEN),
        normal(2, FRAMES, s.mels),
        normal(2, 4, 4, s.width),
    ]


def series(s: Sizes) -> list[Any]:
    return [
        normal(2, 11),
        normal(2, 32),
        normal(2, s.length),
        normal(2, 32, 1),
        normal(2, s.length, 1),
        normal(2, s.length, 4),
    ]


def grid(s: Sizes) -> list[Any]:
    return [torch.tensor([[1, 4, 4]] * 2)]


def lengths(s: Sizes, chosen: dict[str, Any]) -> list[int]:
    """Return the numbers that may be the length of the sequence chosen before."""
    first = next((x for x in chosen.values() if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
    found = [SEQLEN, 16] if first is None else [*reversed(first.shape[1:]), 16]
    return list(dict.fromkeys(n for n in found if n < 5000))


def ones(s: Sizes, chosen: dict[str, Any]) -> list[Any]:
    """Return masks that hide nothing."""
    return [torch.ones(2, n, dtype=torch.long) for n in lengths(s, chosen)]


def other_images(s: Sizes, chosen: dict[str, Any]) -> list[Any]:
    return list(chosen.values())[:1]


Guess = Callable[[Sizes, dict[str, Any]], list[Any]]


def fixed(guess: Callable[[Sizes], list[Any]]) -> Guess:
    """Return a guess that does not depend on what was chosen before."""
    return lambda s, chosen: guess(s)


GUESSES: dict[str, Guess] = {
    **dict.fromkeys(("pixel_values", "image"), fixed(images)),
    **dict.fromkeys(("input_features", "audio_mel", "spectrogram", "mel_spectrogram"), fixed(sounds)),
    "prompt_pixel_values": other_images,
    "prompt_masks": other_images,
    "pixel_values_videos": fixed(
        lambda s: [images(s)[1], images(s)[-1], normal(2, s.frames, s.channels, 64, 64), *images(s)]
    ),
    "input_values": fixed(waves),
    "hidden_states": fixed(states),
    "flattened_patches": fixed(lambda s: [normal(2, 16, s.channels * s.patch**2 + 2).abs().ceil()]),
    "grid_thw": fixed(grid),
    "image_grid_thw": fixed(grid),
    "video_grid_thw": fixed(grid),
    "merge_sizes": fixed(lambda s: [torch.tensor([1, 1])]),
    "spatial_shapes": fixed(lambda s: [torch.tensor([[4, 4], [4, 4]])]),
    "image_sizes": fixed(lambda s: [torch.tensor([[s.image, s.image]] * 2)]),
    "target_sizes": fixed(lambda s: [torch.tensor([[4, 4], [4, 4]])]),
    **dict.fromkeys(
        ("input_features_mask", "attention_mask", "pixel_attention_mask", "input_features_attention_mask"), ones
    ),
    "feature_attention_mask": ones,
    "audio_mel_mask": lambda s, chosen: [x < 1 for x in ones(s, chosen)],
    "padding_mask": lambda s, chosen: [x > 0 for x in ones(s, chosen)],
    "past_values": fixed(series),
    "past_time_features": fixed(lambda s: [normal(2, 11, 1)]),
    "past_observed_mask": fixed(lambda s: [torch.ones(2, 11)]),
    "past_values_padding": fixed(lambda s: [torch.zeros(2, 32)]),
    "freq": fixed(lambda s: [torch.zeros(2, 1, dtype=torch.long)]),
    **dict.fromkeys(("qformer_input_ids", "audio_input_ids", "task_inputs"), fixed(lambda s: [tokens(seed=6)])),
    "encoder_hidden_states": fixed(lambda s: [normal(2, 9, s.width), normal(2, 9, s.other)]),
    **dict.fromkeys(
        ("pixel_position_ids", "image_position_ids"),
        fixed(lambda s: [torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)]),
    ),
    "aspect_ratio_ids": fixed(lambda s: [torch.ones(2, 1, dtype=torch.long)]),
    "aspect_ratio_mask": fixed(lambda s: [torch.ones(2, 1, 4, dtype=torch.long)]),
}


def combinations(keys: list[str], sizes: Sizes, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield values for all keys; a guess may look at the values chosen before."""
    if not keys:
        yield chosen
        return
    for value in GUESSES.get(keys[0], fixed(states))(sizes, chosen):
        yield from combinations(keys[1:], sizes, chosen | {keys[0]: value})


OPTIONAL = (
    "input_features_mask",
    "pixel_attention_mask",
    "spatial_shapes",
    "encoder_hidden_states",
    "image_grid_thw",
    "attention_mask",
    "target_sizes",
)
SIGNALS = ("pixel_values", "input_features", "input_values", "pixel_values_videos", "inputs_embeds")


def guesses(model: Any, name: str, parameters: Any) -> Iterator[Inputs]:
    """Yield combinations of what the model requires, and of text where it takes both."""
    required = [key for key, x in parameters.items() if x.default is inspect.Parameter.empty and x.kind not in VARIADIC]
    signal = [key for key in dict.fromkeys([*required, name]) if key in parameters and key != "input_ids"]
    if not signal:
        signal = [key for key in SIGNALS if key in parameters][:1]
    bases: list[dict[str, Any]] = [{}]
    if "input_ids" in parameters:
        bases = [next(iter(texts(model, parameters))).values, {}]
    elif "decoder_input_ids" in parameters:
        bases = [{"decoder_input_ids": tokens(seqlen=11, seed=3)}, {}]
    optional = [key for key in OPTIONAL if key in parameters and key not in signal]
    sizes = sizes_of(model.config)
    for more in [[], *([key] for key in optional), optional]:
        keys = [*signal, *more]
        for base in bases:
            for values in itertools.islice(combinations(keys, sizes, {}), MOST_TRIES):
                named = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
                masks = [name for name, ids in named.items() if ids in base and name in parameters and name not in keys]
                yield Inputs(base | values, tuple(masks))


VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
