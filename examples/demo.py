"""Train the GPT of gpt.py twice side by side, with anyattn and with PyTorch's own attention, and compare them.

python examples/demo.py --text FILE       `anyattn demo` and `make demo` run this file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import memory
import torch
from gpt import Config, anyattn_attention, torch_attention
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from train import Corpus, Trainer, add_arguments, read_corpus, sample

import anyattn

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

HEADS, HEAD_DIM = 2, 64  # for the long-context measurement, in float32
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
WARM = 2  # first step with typical memory, because the optimiser's state exists
STANDARD_LIMIT = 4096  # longest sequence whose full matrix is computed


@dataclass(frozen=True, slots=True)
class Comparison:
    ours: Trainer
    torchs: Trainer
    step_bytes: dict[str, int | None]

    @property
    def difference(self) -> float:
        """Return the largest difference of the two losses over all steps."""
        return max(abs(a - b) for a, b in zip(self.ours.losses, self.torchs.losses, strict=True))


class Use(NamedTuple):
    """Peak bytes (None: unknown) and seconds of one call."""

    size: int | None
    seconds: float


def train_both(args: argparse.Namespace, corpus: Corpus, console: Console) -> Comparison:
    """Train both models alternately, from the same seed and on the same text, for --steps or --seconds."""
    config = Config(len(corpus.characters), args.context)
    ours, torchs = (Trainer(name, config, seed=args.seed) for name in ("anyattn", "torch"))
    batches = corpus.batches(args.batch, args.context, torch.Generator().manual_seed(args.seed))
    step_bytes: dict[str, int | None] = {}
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    start = time.monotonic()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0, state="")
        for step, batch in zip(range(1, args.steps + 1), batches, strict=False):
            for trainer in (ours, torchs):
                if step == WARM:
                    step_bytes[trainer.name] = memory.peak_bytes(lambda t=trainer, b=batch: t.step(b))
                else:
                    trainer.step(batch)
            seconds = time.monotonic() - start
            state = f"step {step}  loss {ours.losses[-1]:.4f} anyattn  {torchs.losses[-1]:.4f} torch"
            progress.update(bar, completed=max(step / args.steps, seconds / args.seconds), state=state)
            if seconds > args.seconds:
                break
    return Comparison(ours, torchs, step_bytes)


def print_comparison(console: Console, result: Comparison, tokens: int) -> None:
    table = Table("", "anyattn", "PyTorch SDPA", title=f"{len(result.ours.losses)} steps of {tokens} tokens")
    both = (result.ours, result.torchs)
    table.add_row("loss at the start", *(f"{t.losses[0]:.4f}" for t in both))
    table.add_row("loss over the last 20 steps", *(f"{statistics.fmean(t.losses[-20:]):.4f}" for t in both))
    table.add_row("training, tokens/s", *(f"{tokens / t.step_seconds:,.0f}" for t in both))
    table.add_row("step, ms", *(f"{t.step_seconds * 1e3:.0f}" for t in both))
    table.add_row("attention's share of it", *(f"{t.attention_share:.0%}" for t in both))
    table.add_row("attention, ms", *(f"{t.attention_share * t.step_seconds * 1e3:.0f}" for t in both))
    table.add_row("peak memory of a step", *(memory.text(result.step_bytes.get(t.name)) for t in both))
    console.print(table)
    console.print(f"largest difference of the two losses in any step: [bold]{result.difference:.1e}[/]")


def standard_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T) v with the full matrix in memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def standard_bytes(seqlen: int) -> int:
    """Return the bytes of scores and probabilities of every head, and of the mask."""
    return seqlen * seqlen * (2 * HEADS * 4 + 1)


def measure_memory(longest: int) -> dict[str, dict[int, Use]]:
    """Measure one causal forward in addition to q, k and v, by function and length."""
    functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "anyattn": anyattn_attention,
        "PyTorch SDPA": torch_attention,
        "standard": standard_attention,
    }
    found: dict[str, dict[int, Use]] = {name: {} for name in functions}
    for seqlen in (n for n in LENGTHS if n <= longest):
        q, k, v = torch.randn(3, 1, seqlen, HEADS, HEAD_DIM)
        for name, function in functions.items():
            if name != "standard" or seqlen <= STANDARD_LIMIT:
                if seqlen == LENGTHS[0]:
                    function(q, k, v)  # first calls load code
                start = time.perf_counter()
                size = memory.peak_bytes(lambda f=function, x=(q, k, v): f(*x))
                found[name][seqlen] = Use(size, time.perf_counter() - start)
    return found


def print_long_context(console: Console, found: dict[str, dict[int, Use]]) -> None:
    seqlen, used = max(found["anyattn"].items())
    need, out = memory.text(standard_bytes(seqlen)), memory.text(seqlen * HEADS * HEAD_DIM * 4)
    console.print(
        f"\none causal forward over {seqlen:,} tokens, {HEADS} heads of {HEAD_DIM}: standard attention would need "
        f"[bold]{need}[/] for its matrices; anyattn used [bold]{memory.text(used.size)}[/] ({out} of it the output) "
        f"and {used.seconds:.1f} s, PyTorch SDPA {found['PyTorch SDPA'][seqlen].seconds:.1f} s",
        soft_wrap=True,
    )


def plot(path: Path, result: Comparison, tokens: int, used: dict[str, dict[int, Use]]) -> None:
    """Write a picture of losses, speed and memory; each title says the result of its panel."""
    figure, (losses, speed, space) = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    figure.suptitle("A small GPT trained twice, with anyattn and with PyTorch's attention", fontsize="x-large")
    plot_losses(losses, result)
    plot_step(speed, result, tokens)
    plot_memory(space, used)
    figure.supxlabel(
        f"anyattn {anyattn.__version__}, torch {torch.__version__}; float32, CPU threads: {torch.get_num_threads()}; "
        f"{tokens:,} tokens per training step",
        fontsize="small",
        color="gray",
    )
    figure.savefig(path, dpi=110)


def plot_losses(axes: Axes, result: Comparison) -> None:
    steps = range(1, len(result.ours.losses) + 1)
    axes.plot(steps, result.ours.losses, label="anyattn", linewidth=4, alpha=0.5)
    axes.plot(steps, result.torchs.losses, label="PyTorch SDPA", linewidth=1, color="black")
    axes.set(xlabel="training step", ylabel="loss, nats per character")
    axes.set_title(f"Same training: the two losses never\ndiffer by more than {result.difference:.0e}")
    axes.legend()


def plot_step(axes: Axes, result: Comparison, tokens: int) -> None:
    """Draw the time of one training step; the part of attention is the part that differs."""
    for x, trainer in enumerate((result.ours, result.torchs)):
        step, attention = trainer.step_seconds * 1e3, trainer.attention_share * trainer.step_seconds * 1e3
        bars = axes.bar([x], [attention], width=0.6, color="tab:blue", label="" if x else "attention")
        axes.bar([x], [step - attention], 0.6, [attention], color="lightgray", label="" if x else "the rest")
        axes.bar_label(bars, label_type="center", fmt="%.0f ms", color="white")
        axes.text(x, step, f"{tokens / trainer.step_seconds:,.0f} tokens/s", ha="center", va="bottom")
    ratio = result.torchs.step_seconds / result.ours.step_seconds
    axes.set(ylabel="one training step, ms", xticks=[0, 1], xticklabels=["anyattn", "PyTorch SDPA"])
    axes.set_title(f"Training with anyattn is {ratio:.2f} times\nas fast as with PyTorch SDPA")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(loc="upper center", ncols=2)


def plot_memory(axes: Axes, used: dict[str, dict[int, Use]]) -> None:
    """Draw peak memory against length; dashed where the matrices are too large to be written."""
    colors = {"anyattn": "tab:blue", "PyTorch SDPA": "black", "standard": "tab:red"}
    for name, points in used.items():
        known = [(n, use.size / 2**20) for n, use in points.items() if use.size]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", color=colors[name], label=name)
    computed = [n for n in used["anyattn"] if n >= STANDARD_LIMIT]
    need = [standard_bytes(n) / 2**20 for n in computed]
    axes.plot(computed, need, "--", color=colors["standard"], label="standard, computed")
    axes.set(xlabel=f"tokens of one forward pass with {HEADS} heads", xscale="log", yscale="log")
    axes.set_ylabel("peak memory beyond q, k and v")
    axes.set_yticks([1, 32, 1024, 32 * 1024], ["1 MiB", "32 MiB", "1 GiB", "32 GiB"])
    axes.set_title(memory_title(used["anyattn"]))
    axes.set_xticks(list(used["anyattn"]), [f"{n // 1024}k" for n in used["anyattn"]])
    axes.minorticks_off()
    axes.legend()


def memory_title(used: dict[int, Use]) -> str:
    seqlen, use = max(used.items())
    need = memory.text(standard_bytes(seqlen))
    if use.size is None:
        return f"{seqlen:,} tokens without the {need}\nthat standard attention needs"
    return f"{seqlen:,} tokens in {memory.text(use.size)};\nstandard attention would need {need}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="anyattn demo", description="Trains a small GPT with anyattn and with PyTorch's attention."
    )
    add_arguments(parser)
    parser.add_argument(
        "--seconds", type=float, default=60, help="stop training after this many seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--generate", type=int, default=300, help="characters to write afterwards (default: %(default)s)"
    )
    parser.add_argument(
        "--longest", type=int, default=LENGTHS[-1], help="longest sequence measured (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (default: %(default)s)")
    args = parser.parse_args()
    console = Console(highlight=False)
    corpus = read_corpus(args.text, args.context)
    source = args.text or "the Python standard library"
    console.print(
        f"anyattn {anyattn.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{len(corpus.tokens):,} characters of {source}, context {args.context}",
        soft_wrap=True,
    )
    result = train_both(args, corpus, console)
    tokens = args.batch * args.context
    print_comparison(console, result, tokens)
    start = time.perf_counter()
    text = sample(result.ours, corpus, args.prompt, args.generate)
    seconds = time.perf_counter() - start
    console.print(f"\nwritten from the KV cache, {args.generate / seconds:,.0f} tokens/s:")
    console.print(text, markup=False, style="cyan")
    used = measure_memory(args.longest)
    print_long_context(console, used)
    plot(args.output, result, tokens, used)
    console.print(f"picture: {args.output.resolve()}")


if __name__ == "__main__":
    main()
