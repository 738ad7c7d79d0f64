"""The transformers of diffusers, tiny and with random weights, inside and outside of `use_anyattn()`."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from model_sweep import building, checks, verdicts
from model_sweep.configurations import HEAD_DIM, shrink_number, small_list
from model_sweep.inputs import Inputs, normal
from model_sweep.verdicts import NONE, Judge

PREFIX = "diffusers/"
CHANNELS, SIDE, TEXT, WIDTH = 4, 8, 5, 64
MOST_TRIES = 300
CHECKS = ("dense", "gradients")


def classes() -> dict[str, Any]:
    """Return every transformer of the installed diffusers by its name."""
    from diffusers.models import transformers
    from diffusers.models.modeling_utils import ModelMixin

    found = {}
    for module in pkgutil.iter_modules(transformers.__path__):
        for name, kind in vars(importlib.import_module(f"{transformers.__name__}.{module.name}")).items():
            if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__.endswith(module.name):
                found[name] = kind
    return dict(sorted(found.items()))


# Arguments without a default that serves, and lists that name layers.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 32, "cross_attention_dim": WIDTH},
    "HunyuanDiT2DModel": {"in_channels": CHANNELS, "num_layers": 2},
    "LatteTransformer3DModel": {
        "in_channels": CHANNELS,
        "sample_size": SIDE,
        "caption_channels": WIDTH,
        "patch_size": 2,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 2},
    "OmniGenTransformer2DModel": {"pad_token_id": 0},
    "PRXTransformer2DModel": {"axes_dim": [8, 8]},
    "Transformer2DModel": {"in_channels": 32, "cross_attention_dim": WIDTH},
    "TransformerTemporalModel": {"in_channels": 32},
    "WanAnimateTransformer3DModel": {"in_channels": 12},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
    "CogVideoXTransformer3DModel": {"sample_frames": 13, "max_text_seq_length": TEXT},
    "ConsisIDTransformer3DModel": {"sample_frames": 13, "max_text_seq_length": TEXT},
    "HunyuanVideo15Transformer3DModel": {"image_embed_dim": WIDTH},
}


def tiny(kind: Any) -> dict[str, Any]:
    """Return small arguments for the class."""
    parameters = inspect.signature(kind.__init__).parameters
    found = {
        name: small(name, x.default) for name, x in parameters.items() if name != "self" and x.default is not x.empty
    }
    return found | ARGUMENTS.get(kind.__name__, {})


def small(name: str, value: Any) -> Any:
    """Return the small form of a default value."""
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if re.search(r"axes_dim|rope_dim|axes_lens", name) and isinstance(value, list | tuple):
        share = 2 * (HEAD_DIM // 2 // len(value))
        return type(value)([HEAD_DIM - share * (len(value) - 1)] + [share] * (len(value) - 1))
    if isinstance(value, list | tuple):
        return small_list(name, value)
    if re.fullmatch(r"in_channels|out_channels|\w*latent_channels", name):
        return min(value, CHANNELS)
    if re.fullmatch(r"sample_(size|height|width)", name):
        return min(value, SIDE)
    if re.fullmatch(r"sample_frames|patch_size\w*|\w*norm_num_groups|num_groups", name):
        return min(value, 2)
    return shrink_number(name, value) if isinstance(value, int) else value


def values(name: str) -> list[Any]:
    """Return likely values of an argument of a forward call."""
    rows = (SIDE // 2) ** 2
    table: dict[str, list[Any]] = {
        r"hidden_states|x": [
            normal(2, CHANNELS, SIDE, SIDE),
            normal(2, CHANNELS, 4, SIDE, SIDE),
            normal(2, rows, CHANNELS),
            normal(2, 4, CHANNELS, SIDE, SIDE),
            normal(2, CHANNELS, rows),
            normal(2, rows, WIDTH),
            normal(2, CHANNELS, 1, SIDE, SIDE),
            normal(2, 32, SIDE, SIDE),
            normal(2, 64, CHANNELS),
            normal(2, WIDTH),
        ],
        r"(audio_)?encoder_hidden_states(_t5|_2|_image)?|text_bth|context_latents": [
            normal(2, TEXT, WIDTH),
            normal(2, TEXT, CHANNELS),
        ],
        r"timesteps?|timestep_r|t|sigma|\w*_timestep": [torch.tensor([3.0, 500.0]), torch.tensor([3, 500])],
        r"guidance": [torch.tensor([1.0, 2.0])],
        r"pooled_projections|pooled_embeds|proj_embedding": [normal(2, WIDTH)],
        r"img_ids": [ids(rows, 3), ids(rows, 4), ids(rows, 3).expand(2, -1, -1), ids(rows, 4).expand(2, -1, -1)],
        r"txt_ids": [ids(TEXT, 3), ids(TEXT, 4), ids(TEXT, 3).expand(2, -1, -1), ids(TEXT, 4).expand(2, -1, -1)],
        r"\w*encoder\w*_mask\w*": [padding(), padding().bool()],
        r"text_embedding_mask\w*": [padding()],
        r"img_shapes": [[[(1, 4, 4)]] * 2],
        r"class_labels": [torch.tensor([1, 2])],
        r"added_cond_kwargs": [{"resolution": None, "aspect_ratio": None}],
        r"target_size|original_size|crop_coords": [torch.tensor([[8.0, 8.0]] * 2)],
        r"padding_mask": [torch.zeros(1, 1, SIDE, SIDE)],
        r"global_hidden_states": [normal(2, 1, WIDTH), normal(2, WIDTH)],
        r"text_lens": [torch.tensor([5, 3])],
        r"num_frames|height|width": [4],
    }
    return next((found for pattern, found in table.items() if re.fullmatch(pattern, name)), [])


def ids(rows: int, axes: int) -> torch.Tensor:
    return torch.arange(rows).float()[:, None].expand(rows, axes) % 4


def padding() -> torch.Tensor:
    """Return a mask of the text whose second row is padded at the end."""
    return torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2])


def guesses(kind: Any) -> Iterator[Inputs]:
    """Yield combinations of likely arguments: first what the function requires, then everything that is known."""
    parameters = {name: x for name, x in inspect.signature(kind.forward).parameters.items() if name != "self"}
    required = [name for name, x in parameters.items() if x.default is x.empty]
    known = [name for name in parameters if values(name)]
    plain = [name for name in known if "mask" not in name]
    without = [[name for name in plain if name != left] for left in plain if left not in required]
    for names in dict.fromkeys(map(tuple, (required, plain, *without, known))):
        if all(values(name) for name in names):
            product = itertools.product(*(values(name) for name in names))
            for found in itertools.islice(product, MOST_TRIES):
                yield Inputs(dict(zip(names, found, strict=True)))


class Wrapped(torch.nn.Module):
    """A model that computes inside a context."""

    def __init__(self, model: torch.nn.Module, context: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(self, **given: Any) -> Any:
        with self.context():
            return self.model(**given)


def examine(name: str, save: Callable[[Any], None]) -> Any:
    """Return the report about a class of diffusers."""
    from anyattn.compat.diffusers import use_anyattn
    from anyattn.runtime import execute

    begin = time.perf_counter()
    kind = classes()[name.removeprefix(PREFIX)]
    report: dict[str, Any] = {
        "name": name,
        "class": kind.__name__,
        "reason": "",
        "checks": {},
        "calls": {},
        "inputs": {},
    }
    try:
        torch.manual_seed(0)
        model = kind(**tiny(kind)).eval()
    except Exception as error:
        return report | {"reason": f"cannot be built: {verdicts.describe(error)}"}
    building.randomize(model)
    plain, ours = Wrapped(model, nullcontext), Wrapped(model, use_anyattn)
    calls = [0]
    original = execute.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return original(*arguments, **options)

    execute.forward = counted
    reasons = []
    for given in guesses(kind):
        found = verdicts.attempt(checks.dense, plain, given)
        if isinstance(found, Exception):
            reasons.append(verdicts.describe(found))
            continue
        if not found:
            continue
        label = "mask: " if any("mask" in key for key in given.values) else ""
        if label in report["inputs"]:
            continue
        report["inputs"][label] = ", ".join(
            f"{key} {tuple(getattr(x, 'shape', ()))}" for key, x in given.values.items()
        )
        judge = Judge(plain, given)
        for check in CHECKS:
            save(report | {"now": check})
            verdict = judge.judge(check, ours)
            if verdict.outcome != NONE:
                report["checks"][label + check] = {"use_anyattn": verdict}
        report["calls"][label + "use_anyattn"] = calls[0]
    if not report["inputs"]:
        report["reason"] = f"no inputs found: {reasons[0] if reasons else 'its forward function is not understood'}"
    return report | {"seconds": round(time.perf_counter() - begin, 1)}
