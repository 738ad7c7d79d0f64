"""Classes of a model type that the sweep tries, and their variants."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# In this order: what generates comes first, because it shows the most.
HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


class Subject(NamedTuple):
    """One model to try: a class of transformers, and values that replace values of its configuration."""

    model_type: str
    variant: str = ""

    @property
    def name(self) -> str:
        return self.model_type + (f"+{self.variant}" if self.variant else "")


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "decoder": {"is_decoder": True},
    "bidirectional": {"use_bidirectional_attention": True},
    "shared keys": {"num_kv_shared_layers": 1},
}


def names() -> list[str]:
    """Return every model type of the installed transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def configuration_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def subjects(model_type: str) -> list[Subject]:
    """Return the variants of a model type that its configuration knows."""
    fields = getattr(configuration_class(model_type), "__dataclass_fields__", {})
    found = [Subject(model_type)]
    other = model_class(found[0])
    if causal(model_type) and model_class(Subject(model_type, "decoder")) is not other:
        found.append(Subject(model_type, "decoder"))
    if "use_bidirectional_attention" in fields:
        found.append(Subject(model_type, "bidirectional"))
    if "num_kv_shared_layers" in fields:
        found.append(Subject(model_type, "shared keys"))
    return found


def causal(model_type: str) -> bool:
    from transformers.models.auto import modeling_auto

    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def has_other_head(model_type: str) -> bool:
    """Tell whether a model type has a class that shows more than the one that only generates text."""
    from transformers.models.auto import modeling_auto

    fields = getattr(configuration_class(model_type), "__dataclass_fields__", {})
    both = "is_encoder_decoder" in fields and fields["is_encoder_decoder"].default is True
    return both or model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def model_class(subject: Subject) -> Any:
    """Return the class that is tried for a subject; None where transformers has none."""
    return next(candidates(subject), None)


def candidates(subject: Subject) -> Iterator[Any]:
    """Yield the classes of a model type, those that generate first."""
    import transformers
    from transformers.models.auto import modeling_auto

    mappings = sorted(name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name))
    kind = configuration_class(subject.model_type)
    order = [*HEADS, *(name for name in mappings if name not in HEADS)]
    if subject.variant != "decoder":
        order = [*order[1:], order[0]] if has_other_head(subject.model_type) else order
    for mapping in order:
        found = getattr(modeling_auto, mapping).get(subject.model_type)
        for name in [found] if isinstance(found, str) else (found or ()):
            if belongs(getattr(transformers, name, None), kind):
                yield getattr(transformers, name)
    yield from unlisted(subject.model_type)


def belongs(model: Any, kind: type) -> bool:
    """Tell whether a class has this configuration, or needs a package that is not installed."""
    try:
        return getattr(model, "config_class", None) is kind
    except ImportError:
        return True


def unlisted(model_type: str) -> Iterator[Any]:
    """Yield the classes of the configuration's own module that no mapping lists."""
    from transformers import PreTrainedModel

    kind = configuration_class(model_type)
    module = kind.__module__.replace("configuration_", "modeling_")
    try:
        found = vars(importlib.import_module(module)).values()
    except ModuleNotFoundError:
        return
    for model in found:
        own = inspect.isclass(model) and issubclass(model, PreTrainedModel) and model.config_class is kind
        if own and model.forward is not PreTrainedModel.forward and not inspect.isabstract(model):
            yield model
