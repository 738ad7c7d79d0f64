"""Train on packed documents, without padding, and compare with padded training: python examples/packed.py

Several documents follow one another in a row. Attention, positions and targets end where a document ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpt import GPT, Config, anyattn_attention
from torch import Tensor

import anyattn

VOCAB_SIZE, IGNORED = 64, -100  # cross_entropy leaves targets of IGNORED out


class PackedAttention:
    """Causal attention inside each document of a packed row."""

    def __init__(self) -> None:
        self.cu_seqlens = torch.tensor([0], dtype=torch.int32)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take and return (1, total, nheads, head_dim); document b is rows cu_seqlens[b] to cu_seqlens[b + 1]."""
        return anyattn.attention_varlen(q[0], k[0], v[0], self.cu_seqlens, self.cu_seqlens, causal=True)[None]


def targets(document: Tensor) -> Tensor:
    """Return the next token of each token; the last token of a document predicts nothing."""
    return F.pad(document[1:], (0, 1), value=IGNORED)


def packed_loss(model: GPT, attention: PackedAttention, documents: list[Tensor]) -> Tensor:
    """Return the mean loss of documents in one row (1, total), which holds no padding."""
    lengths = torch.tensor([0, *map(len, documents)])
    attention.cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    logits = model(torch.cat(documents)[None], positions=positions)
    return F.cross_entropy(logits[0], torch.cat([targets(document) for document in documents]), ignore_index=IGNORED)


def padded_loss(model: GPT, documents: list[Tensor]) -> Tensor:
    """Return the same loss from one row for each document, all as long as the longest."""
    tokens = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    expected = [targets(document) for document in documents]
    expected = torch.nn.utils.rnn.pad_sequence(expected, batch_first=True, padding_value=IGNORED)
    return F.cross_entropy(model(tokens).flatten(0, 1), expected.flatten(), ignore_index=IGNORED)


def random_documents(count: int, longest: int, generator: torch.Generator) -> list[Tensor]:
    """Return arithmetic sequences of tokens, most of them short, as documents are."""
    draw = torch.rand(count, 3, generator=generator)
    lengths = (2 + (longest - 2) * draw[:, 0] ** 3).int().tolist()
    starts, strides = (VOCAB_SIZE * draw[:, 1]).long(), (1 + 7 * draw[:, 2]).long()
    return [(starts[i] + strides[i] * torch.arange(lengths[i])) % VOCAB_SIZE for i in range(count)]


class Training:
    """A model, its optimizer and the seconds of its steps."""

    def __init__(self, model: GPT, loss: Callable[[list[Tensor]], Tensor]) -> None:
        self.loss, self.seconds = loss, 0.0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(self, documents: list[Tensor]) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(documents)
        loss.backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        return loss.item()


def main(steps: int = 30, count: int = 8, longest: int = 256) -> None:
    config = Config(VOCAB_SIZE, context=longest)
    attention = PackedAttention()
    torch.manual_seed(0)
    packed_model = GPT(config, attention).double()  # in float32, rounding would grow from step to step
    torch.manual_seed(0)
    padded_model = GPT(config, anyattn_attention).double()
    packed = Training(packed_model, lambda documents: packed_loss(packed_model, attention, documents))
    padded = Training(padded_model, lambda documents: padded_loss(padded_model, documents))
    generator = torch.Generator().manual_seed(1)
    largest, tokens, padding = 0.0, 0, 0
    for step in range(1, steps + 1):
        documents = random_documents(count, longest, generator)
        a, b = packed.step(documents), padded.step(documents)
        largest = max(largest, abs(a - b))
        tokens += sum(map(len, documents))
        padding += count * max(map(len, documents))
        if step == 1 or step % 10 == 0:
            print(f"step {step:3}: loss {a:.5f} packed, {b:.5f} padded")
    print(f"packed: {tokens:,} tokens in {packed.seconds:.1f} s; padded: {padding:,} in {padded.seconds:.1f} s")
    print(f"largest difference of the losses: {largest:.1e}")
    assert largest < 1e-9


if __name__ == "__main__":
    main()
