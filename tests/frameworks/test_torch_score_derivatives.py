"""Forward mode and second derivatives of torch through score_mod and mask_mod, and through what score_mod reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jvp, linearize, vmap

import anyattn
from anyattn.compat.flex_attention import flex_attention

Function = Callable[..., Tensor]
TOLERANCE = {"rtol": 0, "atol": 1e-10}
N_Q, N_K, HEADS = 5, 7, 4

torch.manual_seed(0)
ARRAYS = tuple(
    torch.randn(2, *shape, dtype=torch.float64) for shape in ((N_Q, HEADS, 6), (N_K, HEADS // 2, 6), (N_K, 2, 3))
)
ALONG = tuple(torch.randn_like(x) for x in ARRAYS)
TABLE = torch.randn(HEADS, N_Q + N_K, dtype=torch.float64)
TEMPERATURE = torch.rand(2, N_Q, dtype=torch.float64) + 0.5


def curved(table: Tensor) -> Any:
    """Return a score_mod whose derivative by the table depends on the score."""
    return lambda s, b, h, i, j: torch.sin(s) * table[h, i - j + N_K - 1] * TEMPERATURE[b, i]


def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= j - 3) & ((i + j) % 4 != 1)


def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor = TABLE) -> Tensor:
    return anyattn.attention(q, k, v, score_mod=curved(table), mask_mod=visible)


def plain(q: Tensor, k: Tensor, v: Tensor, table: Tensor = TABLE) -> Tensor:
    """Attention with all scores in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    b, h, i, j = (
        torch.arange(size).reshape([-1 if one == axis else 1 for one in range(4)])
        for axis, size in enumerate((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    )
    s = curved(table)(torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5, b, h, i, j)
    s = s.masked_fill(~visible(b, h, i, j), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


def loss(f: Function) -> Function:
    return lambda *arrays: (f(*arrays) ** 3).sum()


def dual_numbers(f: Function) -> Any:
    with fwd.dual_level():
        return fwd.unpack_dual(f(*[fwd.make_dual(x, t) for x, t in zip(ARRAYS, ALONG, strict=True)])).tangent


def double_backward(f: Function) -> Any:
    """Return the gradients of a gradient penalty, also by the table."""
    leaves = [x.clone().requires_grad_() for x in (*ARRAYS, TABLE)]
    first = torch.autograd.grad(loss(f)(*leaves), leaves[:3], create_graph=True)
    return torch.autograd.grad(sum((x**2).sum() for x in first), leaves)


def penalty(f: Function) -> Function:
    return lambda table: (grad(lambda q: loss(f)(q, *ARRAYS[1:], table))(ARRAYS[0]) ** 2).sum()


def tangent_of_q(f: Function, table: Tensor) -> Tensor:
    found: Tensor = jvp(lambda q: f(q, *ARRAYS[1:], table), ARRAYS[:1], ALONG[:1])[1]
    return found


WAYS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: jvp(f, ARRAYS, ALONG),
    "jvp of v alone": lambda f: jvp(lambda v: f(*ARRAYS[:2], v), ARRAYS[2:], ALONG[2:]),
    "dual numbers": dual_numbers,
    "linearize": lambda f: linearize(f, *ARRAYS)[1](*ALONG),
    "jacfwd": lambda f: jacfwd(lambda q: f(q, *ARRAYS[1:])[0, 2])(ARRAYS[0]),
    "hessian": lambda f: hessian(lambda q: loss(f)(q, *(x[:1] for x in ARRAYS[1:])))(ARRAYS[0][:1]),
    "jvp of grad": lambda f: jvp(grad(loss(f), argnums=(0, 1, 2)), ARRAYS, ALONG),
    "grad of jvp": lambda f: grad(lambda *xs: (jvp(f, xs, ALONG)[1] ** 2).sum(), argnums=(0, 1, 2))(*ARRAYS),
    "grad of grad": lambda f: grad(lambda q: (grad(loss(f))(q, *ARRAYS[1:]) ** 2).sum())(ARRAYS[0]),
    "double backward": double_backward,
    "vmap of jvp": lambda f: vmap(lambda q, t: jvp(lambda q: f(q, *ARRAYS[1:]), (q,), (t,))[1])(
        torch.stack([ARRAYS[0], ALONG[0]]), torch.stack([ALONG[0], ARRAYS[0]])
    ),
    "grad by the table of grad": lambda f: grad(penalty(f))(TABLE),
    "grad by the table of jvp": lambda f: grad(lambda table: (tangent_of_q(f, table) ** 2).sum())(TABLE),
}


def tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for part in found:
            yield from tensors(part)


@pytest.mark.parametrize("way", WAYS)
def test_every_order_of_transforms_equals_plain_torch(way: str) -> None:
    for got, want in zip(tensors(WAYS[way](ours)), tensors(WAYS[way](plain)), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)


FUNCTIONS: dict[str, dict[str, Any]] = {
    "both": {"score_mod": curved(TABLE), "mask_mod": visible},
    "mask_mod": {"mask_mod": lambda b, h, i, j: (i + 2 * j) % 3 != 0},
    "score_mod": {"score_mod": lambda s, b, h, i, j: s * torch.sigmoid(s) - 0.1 * s**2, "softcap": 3.0},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_passes_in_forward_mode_and_for_second_derivatives(name: str) -> None:
    small = (ARRAYS[0][:1, :3, :2, :4], ARRAYS[1][:1, :4, :1, :4], ARRAYS[2][:1, :4, :1])
    leaves = [x.clone().requires_grad_() for x in small]

    def with_lse(*arrays: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = anyattn.attention(*arrays, return_lse=True, **FUNCTIONS[name])
        return found

    assert torch.autograd.gradcheck(with_lse, leaves, check_forward_ad=True, fast_mode=False)
    assert torch.autograd.gradgradcheck(with_lse, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_documents_are_packed_sequences_in_every_derivative() -> None:
    documents, x = torch.tensor([0, 0, 1, 1, 1]), ARRAYS[0]

    def call(q: Tensor, mask_mod: Any = None) -> Tensor:
        found: Tensor = anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: torch.sin(s), mask_mod=mask_mod)
        return found

    def packed(q: Tensor) -> Tensor:
        return call(q, lambda b, h, i, j: documents[i] == documents[j])

    def one_by_one(q: Tensor) -> Tensor:
        return torch.cat([call(q[:, :2]), call(q[:, 2:])], 1)

    for got, want in zip(*(jvp(grad(loss(f)), (x,), ALONG[:1]) for f in (packed, one_by_one)), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)


def test_flex_attention_has_second_derivatives() -> None:
    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, curved(TABLE), enable_gqa=True).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, score_mod=curved(TABLE))

    results = [jvp(grad(loss(f), argnums=(0, 1, 2)), ARRAYS, ALONG) for f in (flex, attend)]
    for got, want in zip(*map(tensors, results), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)


def forward_mode() -> Any:
    return jvp(lambda table: ours(*ARRAYS, table), (TABLE,), (TABLE,))


def gradient_of_its_gradient() -> Any:
    return grad(lambda q: (grad(lambda table: loss(ours)(q, *ARRAYS[1:], table))(TABLE) ** 2).sum())(ARRAYS[0])


@pytest.mark.parametrize("way", [forward_mode, gradient_of_its_gradient, lambda: hessian(penalty(ours))(TABLE)])
def test_a_tangent_of_what_score_mod_reads_raises(way: Callable[[], Any]) -> None:
    with pytest.raises(anyattn.UnsupportedProblem, match="pass with a tangent of arrays that score_mod reads"):
        way()
