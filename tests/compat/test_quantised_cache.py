"""transformers' generation with a KV cache of int8 or float8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from anyattn.compat.transformers import QuantisedCache
from anyattn.definition.dtypes import QUANTISED
from anyattn.definition.quantised import quantise as defined
from anyattn.frameworks.torch_tools import quantise

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(2 * 21).reshape(2, 21) * 7 % 50
GENERATE: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, attn_implementation="anyattn", **SIZES)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("stored", QUANTISED)
def test_quantise_has_the_bits_of_the_definition(stored: str) -> None:
    x = torch.randn(40, 3, 17, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None, None]
    x[0], x[1], x[2, 0, 3], x[3, 1, 2] = 0, 1e-44, torch.nan, torch.inf
    stored_bits, scale = quantise(x, stored)
    want, want_scale = defined(x.numpy(), stored)
    assert stored_bits.view(torch.uint8).numpy().tobytes() == want.tobytes()
    assert torch.equal(scale.nan_to_num(-1), torch.from_numpy(want_scale).nan_to_num(-1))


@pytest.mark.parametrize("stored", QUANTISED)
def test_logits_step_by_step(stored: str) -> None:
    """The error against an exact cache is that of the quantisation, and a cache in steps equals one in one go."""
    made, logits = model(), []
    with torch.no_grad():
        want = made(IDS, past_key_values=DynamicCache()).logits
        for steps in ((21,), (1,) * 21, (5, 16)):
            cache = QuantisedCache(stored)
            parts = [made(part, past_key_values=cache).logits for part in IDS.split(steps, dim=1)]
            logits.append(torch.cat(parts, dim=1))
    largest = want.abs().max()
    bound = {"int8": 0.02, "float8_e4m3fn": 0.08, "float8_e5m2": 0.16}[stored]
    assert 0 < (logits[0] - want).abs().max() <= bound * largest
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4 * float(largest))


@pytest.mark.parametrize("padding", [0, 3])
def test_generation(padding: int) -> None:
    made = model()
    mask = torch.ones_like(IDS)
    mask[0, :padding] = 0
    tokens = made.generate(IDS, attention_mask=mask, past_key_values=QuantisedCache(), **GENERATE)
    assert tokens.shape == (2, 33)
    one_by_one = IDS
    for _ in range(12):
        seen = torch.cat([mask, torch.ones(2, one_by_one.shape[1] - 21, dtype=mask.dtype)], dim=1)
        with torch.no_grad():
            positions = (seen.cumsum(1) - 1).clamp(min=0)
            logits = made(
                one_by_one, attention_mask=seen, position_ids=positions, past_key_values=QuantisedCache()
            ).logits
        one_by_one = torch.cat([one_by_one, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, one_by_one)


def test_beams_select_their_sequences() -> None:
    tokens = model().generate(IDS, past_key_values=QuantisedCache("float8_e4m3fn"), num_beams=3, **GENERATE)
    assert tokens.shape == (2, 33)


def test_the_cache_has_half_the_memory_of_16_bits() -> None:
    cache = QuantisedCache()
    with torch.no_grad():
        model()(IDS, past_key_values=cache)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert keys.dtype is values.dtype is torch.int8
    assert keys.shape == (2, 2, 21, 16)
    cache.crop(-5)
    assert cache.get_seq_length() == 16
    cache.reset()
    assert cache.get_seq_length() == 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of int8"):
        QuantisedCache("int4")
    made = model()
    with pytest.raises(ValueError, match="output_attentions"):
        made(IDS, past_key_values=QuantisedCache(), output_attentions=True)
    made.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError):
        made(IDS, past_key_values=QuantisedCache())
