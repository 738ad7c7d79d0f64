"""transformers' models with attn_implementation="flex_attention" on a CPU, through anyattn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.flex_attention as integration
from transformers import masking_utils

from anyattn.compat.flex_attention import use_anyattn

N = 150  # more than one block of torch's BlockMask
PADDING = torch.ones(2, N, dtype=torch.int64)
PADDING[1, :40] = 0
POSITIONS = torch.cat([torch.arange(70), torch.arange(80)]).expand(2, N)  # two packed documents


def model(implementation: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 50, "attn_implementation": implementation, **settings},
    )
    return transformers.LlamaForCausalLM(config)


def step(found: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits and the gradients of a training step."""
    found.train()
    tokens = torch.arange(2 * N).reshape(2, N) % 50
    result = found(tokens, labels=tokens, use_cache=False, **inputs)
    result.loss.backward()
    return result.logits.detach(), [x.grad for x in found.parameters()]


@pytest.mark.parametrize(
    "inputs",
    [{}, {"attention_mask": PADDING}, {"position_ids": POSITIONS}],
    ids=["causal", "padding", "documents"],
)
def test_a_training_step_equals_sdpa(inputs: dict[str, Any]) -> None:
    with use_anyattn():
        logits, grads = step(model("flex_attention"), inputs)
    want, expected = step(model("sdpa"), inputs)
    kept = PADDING.bool() if "attention_mask" in inputs else torch.ones_like(PADDING).bool()
    torch.testing.assert_close(logits[kept], want[kept], rtol=0, atol=1e-5)
    for got, one in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-3, atol=1e-5)


def test_the_functions_of_transformers_are_restored() -> None:
    before = integration.compile_friendly_flex_attention, masking_utils.create_block_mask
    with use_anyattn():
        assert integration.compile_friendly_flex_attention is not before[0]
    assert before == (integration.compile_friendly_flex_attention, masking_utils.create_block_mask)
