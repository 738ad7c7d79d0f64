"""Who is measured. A provider turns a case into a function to time; what is not installed is named, not hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .cases import Case

if TYPE_CHECKING:
    import torch

Run = Callable[[], "list[torch.Tensor]"]


@dataclass(frozen=True, slots=True)
class Provider:
    """`attend(q, k, v, causal)` on torch tensors (batch, seqlen, nheads, head_dim)."""

    name: str
    attend: Callable[[Any, Any, Any, bool], Any]

    def prepare(self, case: Case) -> Run:
        """A function that runs the case once and returns out, or the gradients of q, k and v."""
        import torch

        dtype = getattr(torch, case.dtype)
        q, k, v, dout = (torch.from_numpy(x).to(dtype) for x in case.arrays())
        if not case.backward:
            return lambda: [self.attend(q, k, v, case.causal)]
        for x in (q, k, v):
            x.requires_grad_()
        out = self.attend(q, k, v, case.causal)
        return lambda: list(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))


def providers() -> list[Provider]:
    """Ours first."""
    return [Provider("anyattn", _anyattn), Provider("torch SDPA", _sdpa), Provider("softmax(QK^T)V", _plain)]


def _anyattn(q: Any, k: Any, v: Any, causal: bool) -> Any:
    from .. import attention

    return attention(q, k, v, causal=causal)


def _sdpa(q: Any, k: Any, v: Any, causal: bool) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _plain(q: Any, k: Any, v: Any, causal: bool) -> Any:
    import torch

    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


def correct(case: Case, results: list[torch.Tensor]) -> str | None:
    """None, or how the results differ from the plain formula in float64 (the gate: no speed of a wrong result)."""
    import torch

    exact = Case(**{name: getattr(case, name) for name in case.__slots__} | {"dtype": "float64"})
    dtype = getattr(torch, case.dtype)
    q, k, v, dout = (torch.from_numpy(x).to(dtype).double() for x in case.arrays())
    for x in (q, k, v):
        x.requires_grad_(exact.backward)
    out = _plain(q, k, v, case.causal)
    expected = list(torch.autograd.grad(out, (q, k, v), dout)) if case.backward else [out]
    tolerance = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[case.dtype]
    for got, want in zip(results, expected, strict=True):
        error = float((got.double() - want).abs().max() / want.abs().max())
        if not np.isfinite(error) or error > tolerance:
            return f"relative error {error:.1e} exceeds {tolerance:.0e}"
    return None
