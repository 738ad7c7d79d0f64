"""What is measured: named shapes, their useful work and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..mask import Mask


@dataclass(frozen=True, slots=True)
class Case:
    """One workload; lengths of q and k are equal. `backward`: gradients of q, k and v from a saved forward."""

    name: str
    batch: int
    nheads: int
    seqlen: int
    head_dim: int
    nheads_kv: int = 0  # 0: nheads
    dtype: str = "float32"
    causal: bool = False
    backward: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations over unmasked (row, key) pairs only: 4 D a pair forward, 10 D backward."""
        lo, hi = Mask(right=0 if self.causal else None).bounds(np.arange(self.seqlen), self.seqlen)
        pairs = float((hi - lo).sum()) * self.batch * self.nheads
        return pairs * self.head_dim * (10 if self.backward else 4)

    def arrays(self) -> list[npt.NDArray[np.float32]]:
        """q, k, v, dout: unit normal, (batch, seqlen, nheads, head_dim)."""
        rng = np.random.default_rng(0)
        heads = (self.nheads, self.nheads_kv or self.nheads, self.nheads_kv or self.nheads, self.nheads)
        return [rng.standard_normal((self.batch, self.seqlen, h, self.head_dim), np.float32) for h in heads]

    @property
    def label(self) -> str:
        size = f"({self.batch}, {self.nheads}, {self.seqlen}, {self.head_dim})"
        return f"{size} {self.dtype}{' causal' if self.causal else ''} {'backward' if self.backward else 'forward'}"


def quick() -> list[Case]:
    """The shapes that the README quotes."""
    shapes = [(1, 8, 512, 64), (1, 8, 2048, 64), (1, 16, 2048, 128), (4, 12, 512, 32)]
    return [
        Case(f"{shape}", *shape, dtype=dtype, causal=causal, backward=backward)
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
        for causal in (False, True)
        for shape in shapes
    ]


def lengths() -> list[Case]:
    """Speed against length."""
    return [
        Case(f"length {seqlen}", 1, 8, seqlen, 64, causal=True, backward=backward)
        for backward in (False, True)
        for seqlen in (128, 256, 512, 1024, 2048, 4096)
    ]
