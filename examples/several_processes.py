"""Train the GPT of gpt.py on one long text that is divided over processes: python examples/several_processes.py

Every process has its part of the tokens and all parameters. Attention computes over the whole text, so the losses equal
the losses of one process, and each process needs only its part of the memory.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import memory
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, Config
from torch import Tensor, multiprocessing
from train import read_corpus

from anyattn import distributed
from anyattn.bench.allocations import allocated_bytes


@dataclass(frozen=True)
class Report:
    """Loss of every step, and the peak bytes of each process's tensors in the last step."""

    losses: list[float]
    peak_bytes: list[int]
    seconds: float


class Rank:
    """Model, optimizer and part of the text of one process."""

    def __init__(self, config: Config, tokens: Tensor) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.sharding = distributed.Sharding.zigzag(config.context, world_size)
        self.positions = self.sharding.positions(rank)
        self.tokens, self.targets = tokens[self.positions], tokens[self.positions + 1]
        torch.manual_seed(0)  # the same parameters in every process
        attention = partial(distributed.attention, causal=True, sharding=self.sharding)
        self.model = GPT(config, attention)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self) -> float:
        """Train on the whole text once and return its mean loss."""
        self.optimizer.zero_grad()
        logits = self.model(self.tokens[None], positions=self.positions)
        loss = F.cross_entropy(logits[0], self.targets, reduction="sum") / self.sharding.length
        loss.backward()
        for parameter in self.model.parameters():  # each process has the contribution of its tokens
            dist.all_reduce(parameter.grad)
        self.optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        return total.item()


def train(rank: int, world_size: int, config: Config, tokens: Tensor, steps: int, folder: str) -> None:
    """Train in one of the processes. Process 0 writes the report."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    own = Rank(config, tokens)
    start = time.perf_counter()
    losses = [own.step() for _ in range(steps)]
    seconds = (time.perf_counter() - start) / steps
    own.optimizer.zero_grad()  # the step allocates the gradients
    peak = torch.tensor(allocated_bytes(own.step).peak)
    peaks = [torch.empty_like(peak) for _ in range(world_size)]
    dist.all_gather(peaks, peak)
    if rank == 0:
        torch.save((losses, torch.stack(peaks).tolist(), seconds), f"{folder}/report")
    dist.destroy_process_group()


def run(world_size: int, config: Config, tokens: Tensor, steps: int) -> Report:
    with TemporaryDirectory() as folder:
        arguments = (world_size, config, tokens, steps, folder)
        multiprocessing.spawn(train, arguments, world_size)
        report = Report(*torch.load(f"{folder}/report"))
    peaks = ", ".join(memory.text(peak) for peak in report.peak_bytes)
    print(f"{world_size} processes: {report.seconds:.1f} s per step, at most {peaks} of tensors in a step")
    return report


def main(context: int = 32768, processes: int = 4, steps: int = 3, text: Path | None = None) -> None:
    corpus = read_corpus(text, context)
    config = Config(len(corpus.characters), context, nlayers=2, width=64, nheads=2, nheads_kv=1, head_dim=32)
    divided, whole = (run(size, config, corpus.tokens[: context + 1], steps) for size in (processes, 1))
    for step, (a, b) in enumerate(zip(divided.losses, whole.losses, strict=True), 1):
        print(f"step {step}: loss {a:.6f} in {processes} processes, {b:.6f} in one")
        assert abs(a - b) < 1e-4


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768, help="characters of the text (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--text", type=Path, help="file to train on; default: the source of Python's standard library")
    main(**vars(parser.parse_args()))
