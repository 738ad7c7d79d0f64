"""Small GPT: causal self-attention with grouped heads, rotary positions, RMSNorm, tied embeddings.

Attention is an argument of the model: any function of q (batch, seqlen, nheads, head_dim) and k, v with fewer heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anyattn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# k and v of each layer: (batch, context, nheads_kv, head_dim), and their scales if the cache is quantised
Cache = list[tuple[Tensor, ...]]


def anyattn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = anyattn.attention(q, k, v, causal=True)
    return out


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute PyTorch's own attention, which expects the heads before the sequence."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Config:
    vocab_size: int
    context: int = 1024
    nlayers: int = 2
    width: int = 128
    nheads: int = 4
    nheads_kv: int = 2
    head_dim: int = 64


class SelfAttention(nn.Module):
    def __init__(self, config: Config, attention: Attention) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.q = nn.Linear(config.width, config.nheads * config.head_dim, bias=False)
        self.kv = nn.Linear(config.width, 2 * config.nheads_kv * config.head_dim, bias=False)
        self.out = nn.Linear(config.nheads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, cache: tuple[Tensor, ...] | None, position: int) -> Tensor:
        c = self.config
        q = self.q(x).unflatten(-1, (c.nheads, c.head_dim))  # (batch, seqlen, nheads, head_dim)
        k, v = self.kv(x).unflatten(-1, (2, c.nheads_kv, c.head_dim)).unbind(2)
        q, k = rotate(q, angles), rotate(k, angles)
        out = self.attention(q, k, v) if cache is None else attend_to_cache(q, k, v, cache, position)
        return self.out(out.flatten(2))


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, ...], position: int) -> Tensor:
    """Write k and v to the cache after `position` and attend to all of it, in the cache's dtype or with its scales."""
    k_cache, v_cache, *scales = cache
    options = dict(zip(("k_scale", "v_scale"), scales, strict=False))
    dtype = q.dtype
    if not scales:
        q, k, v = (x.to(k_cache.dtype) for x in (q, k, v))
    out = anyattn.attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=position, causal=True, **options)
    return out.to(dtype)


class Block(nn.Module):
    def __init__(self, config: Config, attention: Attention) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.width)
        self.attention = SelfAttention(config, attention)
        self.norm_mlp = nn.RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, cache: tuple[Tensor, ...] | None, position: int) -> Tensor:
        x = x + self.attention(self.norm_attention(x), angles, cache, position)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    def __init__(self, config: Config, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.nlayers))
        self.norm = nn.RMSNorm(config.width)
        self.register_buffer("angles", rotary_angles(config.context, config.head_dim), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:  # projections onto the residual stream start smaller
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.nlayers) ** 0.5 if last else 0.02)

    def forward(
        self, tokens: Tensor, cache: Cache | None = None, position: int = 0, positions: Tensor | None = None
    ) -> Tensor:
        """Return logits (batch, seqlen, vocab_size) of the token after each of `tokens`.

        The tokens start at `position`. For packed sequences, `positions` (seqlen,) has the position of each token.
        """
        x = self.embedding(tokens)
        angles = self.angles[position : position + tokens.shape[1]] if positions is None else self.angles[positions]
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, cache[layer] if cache else None, position)
        return self.norm(x) @ self.embedding.weight.T

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of tokens[:, 1:], each predicted from the tokens before it."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Return up to `count` tokens after prompt (1, seqlen). Each step computes one query against the KV cache."""
        c = self.config
        shape = (1, c.context, c.nheads_kv, c.head_dim)
        cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(c.nlayers)]
        tokens, new, position = prompt, prompt, 0
        for _ in range(min(count, c.context - prompt.shape[1])):
            logits = self(new, cache, position)[:, -1]
            position += new.shape[1]
            new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            tokens = torch.cat([tokens, new], 1)
        return tokens[:, prompt.shape[1] :]


def rotary_angles(context: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return the angles (context, head_dim / 2)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.arange(context)[:, None] * frequencies


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (first half, second half) of each head of x (batch, seqlen, heads, head_dim) by angles."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (seqlen, 1, head_dim / 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
