"""Tiny models with random weights for which attention matters."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch

from model_sweep import classes, configurations
from model_sweep.classes import Subject
from model_sweep.implementations import OURS

MOST_PARAMETERS = 20_000_000


class CannotBuild(Exception):
    """Raised where no tiny model of a class can be made; the text says why."""


def build(subject: Subject) -> Any:
    """Return a tiny model that computes attention with "eager", in evaluation mode."""
    kind = classes.model_class(subject)
    if kind is None:
        raise CannotBuild("transformers has no model of this type")
    configuration = make_configuration(subject)
    try:
        with torch.device("meta"):
            size = sum(x.numel() for x in initialize(kind, configuration).parameters())
    except (RuntimeError, NotImplementedError, TypeError):
        size = 0  # the device "meta" cannot do something
    if size > MOST_PARAMETERS:
        raise CannotBuild(f"the smallest configuration has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = initialize(kind, configuration)
    randomize(model)
    return model.float().eval()


def initialize(kind: Any, configuration: Any) -> Any:
    """Return a model, after giving its configuration the attributes that the model misses."""
    while True:
        try:
            return kind._from_config(copy.deepcopy(configuration), attn_implementation="eager")
        except AttributeError as error:
            if not borrow(configuration, str(error)):
                raise


def make_configuration(subject: Subject) -> Any:
    """Return the tiny configuration of a subject, with the values of its variant."""
    kind = classes.configuration_class(subject.model_type)
    values = {name: x for name, x in classes.VARIANTS[subject.variant].items() if name in kind.__dataclass_fields__}
    if "Literal" in str(getattr(kind.__dataclass_fields__.get("use_bidirectional_attention"), "type", "")):
        values = {name: "all" if name == "use_bidirectional_attention" else x for name, x in values.items()}
    configuration = configurations.tiny(kind, **values)
    if subject.variant == "bidirectional" and "Literal" in str(
        kind.__dataclass_fields__["use_bidirectional_attention"].type
    ):
        configuration = configurations.tiny(kind, use_bidirectional_attention="all")
    return configuration


MISSING = {"rope_theta": 1e4, "initializer_range": 0.02, "dropout_rate": 0.0}


def borrow(configuration: Any, message: str) -> bool:
    """Give an attribute that a model misses to the configuration that lacks it: from another one, or a common value."""
    found = re.search(r"'(\w+Config)' object has no attribute '(\w+)'", message)
    if not found:
        return False
    name = found[2]
    everything = list(nested(configuration))
    values = [getattr(one, name) for one in everything if hasattr(one, name)]
    values += [MISSING[name]] if name in MISSING else [0] if name.endswith("_token_id") else []
    lacking = [one for one in everything if type(one).__name__ == found[1] and not hasattr(one, name)]
    for one in lacking if values else ():
        setattr(one, name, values[0])
    return bool(values and lacking)


def nested(configuration: Any) -> Iterator[Any]:
    """Yield a configuration and those in it."""
    from transformers import PreTrainedConfig

    yield configuration
    for value in list(vars(configuration).values()):
        if isinstance(value, PreTrainedConfig):
            yield from nested(value)


def ours_from_configuration(model: Any, name: str = OURS) -> Any:
    """Return a model of the same weights that was built with another implementation."""
    configuration = copy.deepcopy(model.config)
    other = type(model)._from_config(configuration, attn_implementation=name)
    other.load_state_dict(model.state_dict())
    copy_generation(model, other)
    return other.float().eval()


def ours_by_setting(model: Any, name: str = OURS) -> Any:
    """Return a copy of a model that was switched to another implementation."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other


def copy_generation(model: Any, other: Any) -> None:
    if getattr(model, "generation_config", None) is not None:
        other.generation_config = copy.deepcopy(model.generation_config)


KEPT = re.compile(r".*(A_log|dt_bias|dt_proj\.bias|log_a|time_decay|position_ids|freqs?|inv_freq|rotary)\w*")
SCALES = re.compile(r".*(scale|gamma|lambda|gate|alpha)\w*")


def randomize(model: Any) -> None:
    """Give every parameter random values: unit variance is kept through each matrix, so that scores are about 1."""
    embeddings = {id(x.weight) for x in model.modules() if isinstance(x, torch.nn.Embedding)}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if KEPT.fullmatch(name) or not x.is_floating_point() or not x.numel():
                continue
            if id(x) in embeddings:
                x.normal_(0, 0.7)
            elif x.ndim > 1 and x[0].numel() > 1:
                x.normal_(0, x[0].numel() ** -0.5)
            elif name.endswith("bias"):
                x.normal_(0, 0.1)
            elif "norm" in name.lower() or bool((x.float().mean() - 1).abs() < 0.1):
                x.copy_(torch.randn_like(x) * 0.2 + 1)
            elif SCALES.fullmatch(name):
                x.copy_(torch.randn_like(x) * 0.2 + 0.6)
