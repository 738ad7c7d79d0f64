"""The arrays of a case, as torch tensors, in the layouts that providers want; made once, outside what is timed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .cases import Case

if TYPE_CHECKING:
    from torch import Tensor

SEED = 20220527  # of dropout
NAMES = ("q", "k", "v", "dout")


class Sequence(NamedTuple):
    """One sequence: (rows or keys, heads, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Inputs:
    """q, k, v and dout, unit normal: (batch, seqlen, nheads, head_dim), packed (total, nheads, head_dim)."""

    def __init__(self, case: Case, seed: int = 0, arrays: Sequence | None = None) -> None:
        import torch

        self.case = case
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self._generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v, self.dout = arrays or (self._normal(shape) for shape in _shapes(case))
        self._heads_first: dict[str, Tensor] = {}

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        import torch

        return torch.empty(shape).normal_(generator=self._generator).to(self.dtype)

    def heads_first(self, name: str) -> Tensor:
        """(batch, nheads, seqlen, head_dim), contiguous: what most others want."""
        if name not in self._heads_first:
            self._heads_first[name] = getattr(self, name).transpose(1, 2).contiguous()
        return self._heads_first[name]

    def sequence(self, b: int) -> Sequence:
        arrays = (self.q, self.k, self.v, self.dout)
        if not self.case.packed:
            return Sequence(*(x[b] for x in arrays))
        start, end = (int(x) for x in self.cu_seqlens[b : b + 2])
        return Sequence(*(x[start:end] for x in arrays))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `attention_forward` that ask for this; without a cache, whose keys are the same."""
        case = self.case
        tables = {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens} if case.packed else {}
        options = {"causal": case.causal, "window": case.window, "softcap": case.softcap, "dropout_p": case.dropout_p}
        scores = {"bias": self.bias, "mask": self.mask, "alibi_slopes": self.alibi_slopes, "sink": self.sink}
        arrays = {"q": self.q, "k": self.k, "v": self.v}
        return {**arrays, **tables, **scores, **options, "seed": SEED if case.dropout_p else None}

    @cached_property
    def parts(self) -> list[Inputs]:
        """A packed case as one dense case for each sequence: how those compute it who have no packed layout."""
        found = []
        for b, n in enumerate(self.case.lengths):
            values = {name: getattr(self.case, name) for name in Case.__slots__}
            values |= {"batch": 1, "seqlen_q": n, "seqlen_k": n, "lengths": ()}
            sequence = Sequence(*(x[None] for x in self.sequence(b)))
            found.append(Inputs(Case(**values), arrays=sequence))
        return found

    @cached_property
    def cu_seqlens(self) -> Tensor:
        import torch

        return torch.tensor([0, *np.cumsum(self.case.lengths)], dtype=torch.int32)

    @cached_property
    def bias(self) -> Tensor | None:
        case = self.case
        shapes = {"full": (1, case.nheads, case.seqlen_q, case.seqlen_k), "key": (1, 1, 1, case.seqlen_k)}
        return self._normal(shapes[case.bias]) if case.bias else None

    @cached_property
    def mask(self) -> Tensor | None:
        """True: seen. (1, 1, seqlen_q or 1, seqlen_k)."""
        import torch

        hidden = self.case.hidden(self.case.seqlen_q, self.case.seqlen_k)
        return None if hidden is None else torch.from_numpy(~hidden)[None, None]

    @cached_property
    def alibi_slopes(self) -> Tensor | None:
        import torch

        return 2.0 ** (-8.0 * torch.arange(1, self.case.nheads + 1) / self.case.nheads) if self.case.alibi else None

    @cached_property
    def sink(self) -> Tensor | None:
        import torch

        return torch.linspace(-1.0, 3.0, self.case.nheads) if self.case.sink else None

    @cached_property
    def block_table(self) -> Tensor:
        """(batch, pages of a sequence), in no order."""
        import torch

        pages = -(-self.case.seqlen_k // self.case.page_size)
        order = torch.randperm(self.case.batch * pages, generator=self._generator)
        return order.to(torch.int32).reshape(self.case.batch, pages)

    @cached_property
    def pages(self) -> tuple[Tensor, Tensor]:
        """k and v as (num_pages, page_size, nheads_kv, head_dim), spread by the block table."""
        case, table = self.case, self.block_table.flatten().long()

        def spread(x: Tensor) -> Tensor:
            padded = x.new_zeros(case.batch, self.block_table.shape[1] * case.page_size, *x.shape[2:])
            padded[:, : case.seqlen_k] = x
            pages = x.new_empty(len(table), case.page_size, *x.shape[2:])
            pages[table] = padded.reshape(pages.shape)
            return pages

        return spread(self.k), spread(self.v)

    @cached_property
    def visible(self) -> Tensor | None:
        """Interval and mask as one boolean array that broadcasts to the scores, for those who need it; None: all."""
        import torch

        case = self.case
        lo, hi = case.bounds(case.seqlen_q, case.seqlen_k)
        if (lo == 0).all() and (hi == case.seqlen_k).all():
            return self.mask
        keys = torch.arange(case.seqlen_k)
        seen = (torch.from_numpy(lo)[:, None] <= keys) & (keys < torch.from_numpy(hi)[:, None])
        return seen[None, None] if self.mask is None else seen & self.mask

    @cached_property
    def additive(self) -> Tensor | None:
        """Bias and ALiBi as one array that broadcasts to the scores, in the case's dtype."""
        import torch

        if self.alibi_slopes is None:
            return self.bias
        case = self.case
        position = torch.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q
        alibi = -self.alibi_slopes[:, None, None] * (position - torch.arange(case.seqlen_k)).abs()
        return (alibi[None] if self.bias is None else alibi + self.bias).to(self.dtype)


def _shapes(case: Case) -> list[tuple[int, ...]]:
    h, h_kv, d, dv = case.nheads, case.nheads_kv, case.head_dim, case.head_dim_v
    if case.packed:
        total = sum(case.lengths)
        return [(total, h, d), (total, h_kv, d), (total, h_kv, dv), (total, h, dv)]
    q, k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
    return [(*q, h, d), (*k, h_kv, d), (*k, h_kv, dv), (*q, h, dv)]
