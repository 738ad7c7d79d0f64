"""A sample of `make models`: an architecture for each way in which a model can ask for its attention and its masks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model_sweep import implementations, table
from model_sweep.subject import examine
from model_sweep.verdicts import CRASH, WRONG

SAMPLE = {
    "llama": "asks transformers for both",
    "mistral": "has a window",
    "t5": "has a bias",
    "whisper": "an encoder of sounds, and a decoder",
    "vit": "an encoder of images",
    "qwen2_vl": "images in text",
    "bloom": "computes attention itself, but asks for a mask",
    "codegen": "computes attention itself, but asks for a mask",
    "xglm": "computes attention itself, but asks for a mask",
    "gpt_neox_japanese": "computes attention itself, but asks for a mask",
    "mpnet": "an encoder that adds the padding mask itself",
    "falcon": "looks the implementation up in a table of its own",
    "gptj": "looks the implementation up in a table of its own",
    "align_text_model": "an encoder whose layers do not say that they are one",
    "gemma2+bidirectional": "a decoder that is used as an encoder",
    "deepseek_v32": "chooses keys",
    "gemma4_text+shared keys": "cuts its mask",
    "moshi": "passes a mask on to another function that makes masks",
    "jamba": "has layers with a state",
    "bamba": "has layers with a state",
    "qwen3_next": "has layers with a state",
}


@pytest.fixture
def _registered() -> Iterator[None]:
    from transformers import AttentionInterface

    before = implementations.register()
    yield
    AttentionInterface.register(implementations.OURS, before)


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("name", SAMPLE)
def test_model_is_computed_right_or_refused(name: str) -> None:
    report = examine(name, lambda partial: None, compile_too=name in ("llama", "vit"))
    assert report["checks"]["dense"].keys() & {"init", "set"} or report["checks"]["build"], report["reason"]
    bad = [found for found in table.outcomes(report) if found[2] in (WRONG, CRASH)]
    assert not bad, "\n".join(f"{check} ({way}): {outcome}, {text}" for check, way, outcome, text in bad)
