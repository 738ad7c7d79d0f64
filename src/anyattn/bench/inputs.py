"""Arrays of a workload as torch tensors, in the layouts that providers need. They are made once and not timed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor

SEED = 20220527  # seed of dropout
NAMES = ("q", "k", "v", "dout")


class Sequence(NamedTuple):
    """Arrays of one sequence: (rows or keys, heads, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Inputs:
    """Unit normal q, k, v and dout of a workload.

    Their shape is (batch, seqlen, nheads, head_dim) or, for packed sequences, (total, nheads, head_dim).
    """

    def __init__(self, workload: Workload, seed: int = 0, arrays: Sequence | None = None) -> None:
        import torch

        self.workload = workload
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self._generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v, self.dout = arrays or (self._normal(shape) for shape in _shapes(workload))
        self.scales: dict[str, Tensor] = {}
        if workload.stored:
            from ..frameworks.torch_tools import quantise

            self.k, self.scales["k_scale"] = quantise(self.k, workload.stored)
            self.v, self.scales["v_scale"] = quantise(self.v, workload.stored)
        self._heads_first: dict[str, Tensor] = {}

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        import torch

        return torch.empty(shape).normal_(generator=self._generator).to(self.dtype)

    def heads_first(self, name: str) -> Tensor:
        """Return (batch, nheads, seqlen, head_dim), contiguous, the layout of most other libraries."""
        if name not in self._heads_first:
            self._heads_first[name] = getattr(self, name).transpose(1, 2).contiguous()
        return self._heads_first[name]

    def sequence(self, b: int) -> Sequence:
        arrays = (self.q, self.k, self.v, self.dout)
        if not self.workload.packed:
            return Sequence(*(x[b] for x in arrays))
        start, end = (int(x) for x in self.cu_seqlens[b : b + 2])
        return Sequence(*(x[start:end] for x in arrays))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `attention_forward` for this workload.

        A cache is left out, because its keys are the same.
        """
        workload = self.workload
        tables = {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens} if workload.packed else {}
        options = {
            "causal": workload.causal,
            "window": workload.window,
            "softcap": workload.softcap,
            "dropout_p": workload.dropout_p,
        }
        scores = {"bias": self.bias, "mask": self.mask, "alibi_slopes": self.alibi_slopes, "sink": self.sink}
        arrays = {"q": self.q, "k": self.k, "v": self.v}
        return {**arrays, **self.scales, **tables, **scores, **options, "seed": SEED if workload.dropout_p else None}

    @cached_property
    def parts(self) -> list[Inputs]:
        """Return a packed workload as one dense workload per sequence, for libraries without a packed layout."""
        found = []
        for b, n in enumerate(self.workload.lengths):
            values = {name: getattr(self.workload, name) for name in Workload.__slots__}
            values |= {"batch": 1, "seqlen_q": n, "seqlen_k": n, "lengths": ()}
            sequence = Sequence(*(x[None] for x in self.sequence(b)))
            found.append(Inputs(Workload(**values), arrays=sequence))
        return found

    @cached_property
    def cu_seqlens(self) -> Tensor:
        import torch

        return torch.tensor([0, *np.cumsum(self.workload.lengths)], dtype=torch.int32)

    @cached_property
    def bias(self) -> Tensor | None:
        workload = self.workload
        shapes = {
            "full": (1, workload.nheads, workload.seqlen_q, workload.seqlen_k),
            "key": (1, 1, 1, workload.seqlen_k),
        }
        return self._normal(shapes[workload.bias]) if workload.bias else None

    @cached_property
    def mask(self) -> Tensor | None:
        """Return the boolean mask (1, 1, seqlen_q or 1, seqlen_k); True: visible."""
        import torch

        masked = self.workload.masked(self.workload.seqlen_q, self.workload.seqlen_k)
        return None if masked is None else torch.from_numpy(~masked)[None, None]

    @cached_property
    def alibi_slopes(self) -> Tensor | None:
        import torch

        return (
            2.0 ** (-8.0 * torch.arange(1, self.workload.nheads + 1) / self.workload.nheads)
            if self.workload.alibi
            else None
        )

    @cached_property
    def sink(self) -> Tensor | None:
        import torch

        return torch.linspace(-1.0, 3.0, self.workload.nheads) if self.workload.sink else None

    @cached_property
    def block_table(self) -> Tensor:
        """Return the block table (batch, pages of a sequence), in random order."""
        import torch

        pages = -(-self.workload.seqlen_k // self.workload.page_size)
        order = torch.randperm(self.workload.batch * pages, generator=self._generator)
        return order.to(torch.int32).reshape(self.workload.batch, pages)

    @cached_property
    def pages(self) -> dict[str, Tensor]:
        """Return k, v and scales as (num_pages, page_size, nheads_kv, head_dim), arranged by the block table."""
        workload, table = self.workload, self.block_table.flatten().long()

        def spread(x: Tensor) -> Tensor:
            padded = x.new_zeros(workload.batch, self.block_table.shape[1] * workload.page_size, *x.shape[2:])
            padded[:, : workload.seqlen_k] = x
            pages = x.new_empty(len(table), workload.page_size, *x.shape[2:])
            pages[table] = padded.reshape(pages.shape)
            return pages

        return {name: spread(x) for name, x in {"k": self.k, "v": self.v, **self.scales}.items()}

    @cached_property
    def visible(self) -> Tensor | None:
        """Return interval and mask as one boolean array that broadcasts to the scores; None: everything is visible."""
        import torch

        workload = self.workload
        lo, hi = workload.bounds(workload.seqlen_q, workload.seqlen_k)
        if (lo == 0).all() and (hi == workload.seqlen_k).all():
            return self.mask
        keys = torch.arange(workload.seqlen_k)
        seen = (torch.from_numpy(lo)[:, None] <= keys) & (keys < torch.from_numpy(hi)[:, None])
        return seen[None, None] if self.mask is None else seen & self.mask

    @cached_property
    def additive(self) -> Tensor | None:
        """Return bias and ALiBi as one array that broadcasts to the scores, in the workload's dtype."""
        import torch

        if self.alibi_slopes is None:
            return self.bias
        workload = self.workload
        position = torch.arange(workload.seqlen_q)[:, None] + workload.seqlen_k - workload.seqlen_q
        alibi = -self.alibi_slopes[:, None, None] * (position - torch.arange(workload.seqlen_k)).abs()
        return (alibi[None] if self.bias is None else alibi + self.bias).to(self.dtype)


def _shapes(workload: Workload) -> list[tuple[int, ...]]:
    h, h_kv, d, dv = workload.nheads, workload.nheads_kv, workload.head_dim, workload.head_dim_v
    if workload.packed:
        total = sum(workload.lengths)
        return [(total, h, d), (total, h_kv, d), (total, h_kv, dv), (total, h, dv)]
    q, k = (workload.batch, workload.seqlen_q), (workload.batch, workload.seqlen_k)
    return [(*q, h, d), (*k, h_kv, d), (*k, h_kv, dv), (*q, h, dv)]
