"""Refusal of models that compute attention themselves, because "anyattn" would have no effect or break them."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from transformers import PreTrainedModel

NAME = "anyattn"
OWN_ATTENTION = re.compile(r"^class \w*Attention\w*\(nn\.Module\):", re.MULTILINE)
CLASS_TABLE = re.compile(r"_CLASSES\[\s*(self\.)?config\._attn_implementation\s*\]")


def refuse_unsupported_models() -> None:
    """Make transformers raise ValueError if "anyattn" is chosen for a class that never calls the attention function."""
    choose = PreTrainedModel.get_correct_attn_implementation
    if getattr(choose, "_by_anyattn", False):
        return

    def get_correct_attn_implementation(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == NAME and computes_attention_itself(type(self)):
            raise ValueError(
                f"{type(self).__name__} computes attention itself and never calls attn_implementation='{NAME}'. Use "
                "'eager' or 'sdpa' for it. In a model of several parts, name the part that is to run on anyattn: "
                f"attn_implementation={{'vision_config': '{NAME}'}}, for example."
            )
        return choose(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation._by_anyattn = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


def computes_attention_itself(model: type) -> bool:
    """Return whether no attention module of this class uses transformers' AttentionInterface, judged by its source."""
    sources = [_source(cls.__module__) for cls in _model_classes(model)]
    if any(CLASS_TABLE.search(source) for source in sources):
        return True
    if any("ALL_ATTENTION_FUNCTIONS" in source for source in sources):
        return False
    return any(OWN_ATTENTION.search(source) for source in sources)


def _model_classes(model: type) -> list[type]:
    return [cls for cls in model.__mro__ if issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel]


def _source(module: str) -> str:
    """Return the source of a module; empty if there is none, for example for a class defined in a notebook."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""
