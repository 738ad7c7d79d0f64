"""Run a model of Hugging Face transformers with anyattn: python examples/transformers_model.py

The model is a small Llama with random weights, so nothing is downloaded. With a model of your own:

    model = AutoModelForCausalLM.from_pretrained("name-or-folder", attn_implementation="anyattn")
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import anyattn.compat.transformers  # noqa: F401  registers attn_implementation="anyattn"

VOCAB_SIZE = 256


def tiny_llama(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # large, so that the text depends strongly on attention
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="anyattn").eval()


def padded_prompts() -> tuple[Tensor, Tensor]:
    """Return two prompts of 12 and 7 tokens, the shorter one padded on its left, and their attention mask."""
    tokens, mask = torch.randint(1, VOCAB_SIZE, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    tokens[1, :5] = mask[1, :5] = 0
    return tokens, mask


def generate(model: PreTrainedModel, tokens: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return `count` new tokens of each prompt, by greedy search from a KV cache."""
    texts = model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return texts[:, tokens.shape[1] :]


def gradients(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the gradient of every parameter of the loss of all tokens that follow a token of the prompt."""
    model.zero_grad()
    follows = mask * mask.roll(1, 1)
    model(tokens, attention_mask=mask, labels=tokens.masked_fill(follows == 0, -100)).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def main(count: int = 24) -> None:
    model = tiny_llama(seed=0)
    tokens, mask = padded_prompts()
    text, ours = generate(model, tokens, mask, count), gradients(model, tokens, mask)
    print(f"anyattn wrote {text[0].tolist()}")

    model.set_attn_implementation("eager")
    expected, eager = generate(model, tokens, mask, count), gradients(model, tokens, mask)
    print(f"eager wrote   {expected[0].tolist()}")
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, eager, strict=True))
    print(f"largest relative difference of a parameter's gradient: {difference:.1e}")
    assert torch.equal(text, expected)
    assert difference < 1e-4


if __name__ == "__main__":
    main()
