"""Train the GPT of gpt.py on characters: Python's standard library, or your own file.

python examples/train.py --text FILE --attention torch --steps 500
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpt import GPT, Attention, Config, anyattn_attention, torch_attention
from rich.console import Console
from torch import Tensor

ATTENTIONS = {"anyattn": anyattn_attention, "torch": torch_attention}
MAX_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text as numbers: characters[token] is the character."""

    tokens: Tensor
    characters: str

    def encode(self, text: str) -> Tensor:
        """Return tokens (1, seqlen). Characters that the text does not have are left out."""
        index = {character: token for token, character in enumerate(self.characters)}
        return torch.tensor([[index[character] for character in text if character in index]])

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[token] for token in tokens.flatten().tolist())

    def batches(self, batch: int, seqlen: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield random pieces (batch, seqlen + 1) without end."""
        while True:
            starts = torch.randint(len(self.tokens) - seqlen, (batch,), generator=generator)
            yield torch.stack([self.tokens[start : start + seqlen + 1] for start in starts.tolist()])


def read_corpus(path: Path | None, context: int) -> Corpus:
    """Return the characters of a file, or of Python's standard library."""
    if path is not None:
        text = path.read_text(encoding="utf-8", errors="replace")[:MAX_CHARACTERS]
    else:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "".join(file.read_bytes().decode("ascii", "ignore") for file in files)[:MAX_CHARACTERS]
    if len(text) < 2 * context:
        raise SystemExit(
            f"{path or 'the standard library'} has {len(text)} characters; training needs at least {2 * context}"
        )
    characters = "".join(sorted(set(text)))
    index = {character: token for token, character in enumerate(characters)}
    return Corpus(torch.tensor([index[character] for character in text]), characters)


class Stopwatch:
    """Attention function that measures the time spent in it, forward and backward."""

    def __init__(self, attention: Attention) -> None:
        self.attention, self.seconds = attention, 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = time.perf_counter()
        # In attention's backward pass, gradients reach `out` first and the aliases last.
        out = self.attention(*(self._alias(x) for x in (q, k, v)))
        self.seconds += time.perf_counter() - start
        if out.requires_grad:
            out.register_hook(self._start_backward)
        return out

    def _alias(self, x: Tensor) -> Tensor:
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(self._add_backward)
        return x

    def _start_backward(self, _: Tensor) -> None:
        self.since = time.perf_counter()

    def _add_backward(self, _: Tensor) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now


@dataclass
class Trainer:
    """Model with its optimiser. `step` trains it on one batch and records the results."""

    name: str
    config: Config
    learning_rate: float = 3e-3
    seed: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # seconds of each step, and of attention in it
    attention_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.stopwatch = Stopwatch(ATTENTIONS[self.name])
        self.model = GPT(self.config, self.stopwatch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 20))

    def step(self, batch: Tensor) -> float:
        start, self.stopwatch.seconds = time.perf_counter(), 0.0
        loss = self.model.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.attention_seconds.append(self.stopwatch.seconds)
        return self.losses[-1]

    @property
    def step_seconds(self) -> float:
        """Return the median, which ignores busy moments of the machine."""
        return statistics.median(self.seconds)

    @property
    def attention_share(self) -> float:
        return statistics.median(self.attention_seconds) / self.step_seconds


def sample(trainer: Trainer, corpus: Corpus, prompt: str, count: int) -> str:
    """Return the text that the model writes after `prompt`, using a KV cache."""
    generator = torch.Generator().manual_seed(trainer.seed)
    return prompt + corpus.decode(trainer.model.generate(corpus.encode(prompt), count, 0.7, generator))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="file to train on; default: the source of Python's standard library")
    parser.add_argument("--prompt", default="def ", help="what generation starts from (default: %(default)r)")
    parser.add_argument("--steps", type=int, default=240, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="characters per sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--attention", choices=ATTENTIONS, default="anyattn")
    args = parser.parse_args()
    console = Console(highlight=False)
    corpus = read_corpus(args.text, args.context)
    trainer = Trainer(args.attention, Config(len(corpus.characters), args.context), seed=args.seed)
    batches = corpus.batches(args.batch, args.context, torch.Generator().manual_seed(args.seed))
    for step, batch in zip(range(1, args.steps + 1), batches, strict=False):
        loss = trainer.step(batch)
        if step % 10 == 0 or step == 1:
            speed = batch[:, 1:].numel() / trainer.step_seconds
            console.print(
                f"step {step:5d}  loss {loss:.4f}  {speed:,.0f} tokens/s  attention {trainer.attention_share:.0%}"
            )
    console.print(sample(trainer, corpus, args.prompt, 400), markup=False)


if __name__ == "__main__":
    main()
