"""Train a MeanFlow model. Each step needs forward mode and then an ordinary backward pass through the same attention.

python examples/meanflow.py --tokens 1024 --steps 20

The script first compares one step with PyTorch's math path, in results and in memory. Then it trains.
Source: Geng et al., "Mean Flows for One-step Generative Modeling" (2025), algorithm 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from memory import peak_bytes, text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import anyattn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's only implementation with forward mode. It stores every score."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class Block(nn.Module):
    """Transformer block with full attention. The shift and scale of its norms depend on the times."""

    def __init__(self, width: int, nheads: int, attention: Attention) -> None:
        super().__init__()
        self.nheads, self.attention = nheads, attention
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.times = nn.Linear(width, 4 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        shifts = self.times(times).chunk(4, -1)
        y = self.norms[0](x) * (1 + shifts[0]) + shifts[1]
        q, k, v = self.qkv(y).unflatten(-1, (3, self.nheads, -1)).unbind(2)
        x = x + self.proj(self.attention(q, k, v).flatten(2))
        y = self.norms[1](x) * (1 + shifts[2]) + shifts[3]
        return x + self.down(torch.nn.functional.silu(self.up(y)))


class Model(nn.Module):
    """Average velocity u(z, r, t) of the flow between the times r and t, for tokens (batch, tokens, channels)."""

    def __init__(
        self, attention: Attention, channels: int = 8, width: int = 64, nheads: int = 8, depth: int = 4
    ) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.embed = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, nheads, attention) for _ in range(depth))

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        times = self.embed(torch.cat([r, t], -1))
        x = self.enter(z)
        for block in self.blocks:
            x = block(x, times)
        return self.leave(x)


def meanflow_loss(model: Model, data: Tensor, noise: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """Return the loss of a batch. r <= t: times (batch, 1, 1)."""
    z, velocity = (1 - t) * data + t * noise, noise - data
    u, rate = torch.func.jvp(model, (z, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))
    target = velocity - (t - r) * rate
    return (u - target.detach()).square().mean()


class Step(NamedTuple):
    """Results of one step: loss, gradients of the parameters, and peak bytes (None if unknown)."""

    loss: float
    gradients: list[Tensor]
    peak: int | None


def samples(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return data (smooth curves), noise and two times."""
    phase = torch.rand(batch, 1, 8, dtype=dtype) * 6.3
    data = torch.sin(torch.linspace(0, 12, tokens, dtype=dtype)[:, None] * torch.arange(1, 9) / 4 + phase)
    r, t = torch.rand(2, batch, 1, 1, dtype=dtype).sort(0).values
    return data, torch.randn_like(data), r, t


def one_step(attention: Attention, tokens: int, dtype: torch.dtype = torch.float32) -> Step:
    """Return the results of a step on a new model, which depends only on the attention."""
    torch.manual_seed(0)
    model, batch = Model(attention).to(dtype), samples(1, tokens, dtype)
    meanflow_loss(model, *samples(1, 16, dtype)).backward()  # loads libraries and allocates the gradients
    model.zero_grad(set_to_none=False)
    found = []

    def work() -> None:
        loss = meanflow_loss(model, *batch)
        loss.backward()
        found.append(loss.item())

    peak = peak_bytes(work)
    return Step(found[0], [p.grad for p in model.parameters() if p.grad is not None], peak)


def compare(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Step, Step]:
    """Return a step with anyattn and a step with the math path.

    Raises:
        AssertionError: their gradients differ.
    """
    steps = one_step(anyattn.attention, tokens, dtype), one_step(math_attention, tokens, dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for ours, theirs in zip(*(step.gradients for step in steps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
    return steps


def train(tokens: int, steps: int) -> list[float]:
    """Return the losses of a training run."""
    torch.manual_seed(0)
    model = Model(anyattn.attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = meanflow_loss(model, *samples(2, tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(tokens: int = 1024, steps: int = 20) -> None:
    """Compare one step with the math path, then train."""
    ours, theirs = compare(tokens)
    print(f"one step, {tokens:,} tokens, 4 layers: gradients equal PyTorch's math path")
    print(f"extra memory: {text(ours.peak)} with anyattn, {text(theirs.peak)} with the math path")
    losses = train(tokens, steps)
    print(f"loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {steps}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    main(**vars(parser.parse_args()))
