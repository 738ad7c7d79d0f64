"""Measure the perplexity of a small GPT with KV caches of float32, bfloat16, int8 and float8.

The model of gpt.py is trained for some steps on characters, and evaluated on text that it has not seen, with every key
and value read from the cache.

python examples/quantised_cache.py --steps 300
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from gpt import GPT, Cache, Config
from torch import Tensor
from train import Trainer, add_arguments, read_corpus

from anyattn.nn import KVCache

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
CHUNK = 16  # tokens per step
TEXTS = 16


def empty_cache(config: Config, batch: int, dtype: str) -> Cache:
    """Return a cache of this dtype for every layer, with scales if it is quantised."""
    plain = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    cache = []
    for _ in range(config.nlayers):
        layer = KVCache(batch, config.context, config.nheads_kv, config.head_dim, dtype=plain.get(dtype, dtype))
        scales = () if layer.k_scale is None or layer.v_scale is None else (layer.k_scale, layer.v_scale)
        cache.append((layer.k, layer.v, *scales))
    return cache


@torch.no_grad()
def perplexity(model: GPT, texts: Tensor, dtype: str) -> float:
    """Return exp(mean cross-entropy) of the texts (batch, context + 1), token by token from a cache of this dtype."""
    cache, losses = empty_cache(model.config, len(texts), dtype), []
    for start in range(0, texts.shape[1] - 1, CHUNK):
        tokens = texts[:, start : start + CHUNK + 1]
        logits = model(tokens[:, :-1], cache, start)
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean().exp())


def main(steps: int = 240, context: int = 1024, batch: int = 2, seed: int = 0) -> dict[str, float]:
    """Train, print the perplexity with every cache, and return them."""
    corpus = read_corpus(None, context)
    held_out = len(corpus.tokens) - TEXTS * (context + 1)
    texts = corpus.tokens[held_out:].reshape(TEXTS, context + 1)
    corpus.tokens.resize_(held_out)
    trainer = Trainer("anyattn", Config(len(corpus.characters), context), seed=seed)
    batches = corpus.batches(batch, context, torch.Generator().manual_seed(seed))
    for _, one in zip(range(steps), batches, strict=False):
        trainer.step(one)
    found = {dtype: perplexity(trainer.model, texts, dtype) for dtype in DTYPES}
    for dtype, value in found.items():
        print(f"{dtype:14} perplexity {value:.4f}  {value / found['float32'] - 1:+.4%}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.context, arguments.batch, arguments.seed)
