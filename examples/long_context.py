"""Read a long text with sliding-window attention in bounded memory: python examples/long_context.py

Each query attends to the last WINDOW tokens, so older keys and values are never read again. A ring of pages holds the
rest: the newest page overwrites the oldest. The block table names the pages in order; no key is moved.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import memory
import torch
from gpt import GPT, Config
from torch import Tensor

import anyattn

WINDOW, PAGE_SIZE = 1024, 256


class Ring:
    """The last keys and values of each layer, in WINDOW / PAGE_SIZE + 1 pages."""

    def __init__(self, model: GPT) -> None:
        self.pages = WINDOW // PAGE_SIZE + 1  # the first query of a new page attends to WINDOW - 1 older keys
        shape = (self.pages, PAGE_SIZE, model.config.nheads_kv, model.config.head_dim)
        self.layers = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.blocks]
        self.table = torch.arange(self.pages, dtype=torch.int32)[None]  # oldest page first
        self.used = 0  # tokens in the pages
        for layer, block in enumerate(model.blocks):
            block.attention.attention = partial(self.attend, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append keys and values to the newest page and attend to the window."""
        paged = {"block_table": self.table, "cache_seqlens": self.used}
        return anyattn.attention_with_kvcache(
            q, *self.layers[layer], k=k, v=v, causal=True, window=(WINDOW - 1, 0), **paged
        )

    def advance(self, count: int) -> None:
        """Count `count` new tokens; when all pages are full, give the oldest page to the tokens that follow."""
        self.used += count
        if self.used == self.pages * PAGE_SIZE:
            self.table = self.table.roll(-1, 1)
            self.used -= PAGE_SIZE

    def size(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)


class Reader:
    """A model that reads text piece by piece and predicts the token after it."""

    def __init__(self, model: GPT) -> None:
        self.model, self.ring, self.position = model, Ring(model), 0

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield the logits (count, vocab_size) after each of `tokens` (seqlen,), at most a page at once."""
        while len(tokens):
            new = tokens[: PAGE_SIZE - self.ring.used % PAGE_SIZE]
            yield self.model(new[None], position=self.position)[0]
            self.ring.advance(len(new))
            self.position += len(new)
            tokens = tokens[len(new) :]


def windowed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to the last WINDOW tokens of a sequence that is in memory as a whole."""
    return anyattn.attention(q, k, v, causal=True, window=(WINDOW - 1, 0))


def check(reader: Reader, whole: GPT, tokens: Tensor) -> None:
    """Compare pieces of many sizes with one call on all tokens."""
    with torch.no_grad():
        expected = whole(tokens[None])[0]
    half = len(tokens) // 2  # the second half is read token by token, as generation does
    pieces = [tokens[:half], *tokens[half:].split(1)]
    got = torch.cat([logits for piece in pieces for logits in reader.read(piece)])
    difference = (got - expected).abs().max().item()
    print(f"{len(tokens):,} tokens: the largest difference from one call on all of them is {difference:.1e}")
    assert difference < 1e-4


def main(length: int = 65536, checked: int = 4096) -> None:
    tokens = torch.randint(64, (length,), generator=torch.Generator().manual_seed(0))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(GPT(Config(vocab_size=64, context=length), windowed_attention))
    reader = Reader(models[0])
    check(reader, models[1], tokens[:checked])
    size = reader.ring.size()
    print(f"{'tokens':>8} {'ring':>10} {'full cache':>11} {'peak of reading':>16} {'tokens/s':>9}")
    for stop in (length // 8, length // 4, length // 2, length):
        new, start = tokens[reader.position : stop], time.perf_counter()
        peak = memory.peak_bytes(lambda new=new: [None for _ in reader.read(new)])
        speed = len(new) / (time.perf_counter() - start)
        full = size // (reader.ring.pages * PAGE_SIZE) * stop
        texts = [memory.text(x) for x in (size, full, peak)]
        print(f"{stop:8,} {texts[0]:>10} {texts[1]:>11} {texts[2]:>16} {speed:9,.0f}")
    assert reader.ring.size() == size


if __name__ == "__main__":
    main()
