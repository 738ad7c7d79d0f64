"""Models of transformers that are hard-wired to flash_attention_2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import anyattn.compat.flash_attn
import anyattn.compat.transformers as adapter
from compat import models
from compat.models import MODELS, TOLERANCE, WINDOW, built, packed

# Models that are hard-wired to flash_attention_2.


@pytest.fixture
def flash_attention_2() -> Iterator[None]:
    adapter.install_flash_attention_2()
    yield
    adapter.uninstall_flash_attention_2()


@pytest.mark.usefixtures("flash_attention_2")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_models_on_flash_attention_2_equal_eager_attention(name: str) -> None:
    """Logits with padding, gradients, generated tokens, packed sequences."""
    from transformers import modeling_flash_attention_utils

    model, given = MODELS[name].build(), models.inputs(MODELS[name], "left")
    valid = given["attention_mask"].bool()
    want, got = (models.logits(model, kind, **given) for kind in ("eager", "flash_attention_2"))
    torch.testing.assert_close(got[valid], want[valid], **TOLERANCE)
    ids = models.tokens()
    want, got = (models.gradients(model, kind, input_ids=ids, labels=ids) for kind in ("eager", "flash_attention_2"))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    want, got = (models.logits(model, kind, **packed(), use_cache=False) for kind in ("eager", "flash_attention_2"))
    torch.testing.assert_close(got, want, **TOLERANCE)
    both = []
    for kind in ("eager", "flash_attention_2"):
        model.set_attn_implementation(kind)
        both.append(model.generate(**given, max_new_tokens=2 * WINDOW, do_sample=False, pad_token_id=0))
    assert torch.equal(*both)
    assert modeling_flash_attention_utils._flash_varlen_fn is anyattn.compat.flash_attn.flash_attn_varlen_func


def test_uninstall_restores_flash_attention_2() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**models.GROUPED)
    adapter.install_flash_attention_2()
    adapter.install_flash_attention_2()
    assert LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        built("t5").set_attn_implementation("flash_attention_2")
    adapter.uninstall_flash_attention_2()
    adapter.uninstall_flash_attention_2()
    with pytest.raises(ImportError, match="FlashAttention2"):
        LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
