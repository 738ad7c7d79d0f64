"""Tangents and second derivatives of torch through every function that calls attention, and under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import anyattn
import anyattn.compat.torch
from anyattn.compat import flash_attn_3, flash_attn_4
from anyattn.compat.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_varlen_func

Function = Callable[..., Tensor]
TOLERANCE = {"rtol": 0, "atol": 1e-10}

torch.manual_seed(0)
ARRAYS = tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6)))
ALONG = tuple(torch.randn_like(x) for x in ARRAYS)


def plain(q: Tensor, k: Tensor, v: Tensor, softcap: float = 0.0, sink: Tensor | None = None) -> Tensor:
    """Causal attention with all scores in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    s = softcap * torch.tanh(s / softcap) if softcap else s
    n_q, n_k = s.shape[-2:]
    s = s.masked_fill(torch.ones(n_q, n_k, dtype=torch.bool).triu(n_k - n_q + 1), -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(*s.shape[:-1], 1)], -1)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1)[..., :n_k], v)


def packed(attend: Function, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every batch entry as a packed sequence."""
    cu = [torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    out = attend(*(x.flatten(0, 1) for x in (q, k, v)), *cu, q.shape[1], k.shape[1], causal=True)
    return out.unflatten(0, q.shape[:2])


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal_lower_right(q.shape[1], k.shape[1])
    out = anyattn.sdpa(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


FUNCTIONS: dict[str, Function] = {
    "attention": lambda q, k, v: anyattn.attention(q, k, v, causal=True),
    "attention_varlen": lambda q, k, v: packed(anyattn.attention_varlen, q, k, v),
    "flash_attn_func": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
    "flash_attn_kvpacked_func": lambda q, k, v: flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True),
    "flash_attn_varlen_func": lambda q, k, v: packed(flash_attn_varlen_func, q, k, v),
    "flash_attn_3": lambda q, k, v: flash_attn_3.flash_attn_func(q, k, v, causal=True),
    "flash_attn_4": lambda q, k, v: flash_attn_4.flash_attn_func(q, k, v, causal=True)[0],
    "sdpa": sdpa,
}


def loss(f: Function) -> Function:
    return lambda *arrays: (f(*arrays) ** 3).sum()


def double_backward(f: Function, *arrays: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in arrays]
    first = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
    found: tuple[Tensor, ...] = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    return found


def both_orders(f: Function, arrays: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Yield tangents, a Hessian-vector product, the gradients of a tangent, and the gradients of gradients."""
    every = tuple(range(len(arrays)))
    yield from jvp(f, arrays, along)
    yield from jvp(grad(loss(f), argnums=every), arrays, along)[1]
    yield from grad(lambda *xs: jvp(f, xs, along)[1].square().sum(), argnums=every)(*arrays)
    yield from double_backward(f, *arrays)


def check(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_derivatives_of_both_orders(name: str) -> None:
    check(both_orders(FUNCTIONS[name], ARRAYS, ALONG), both_orders(plain, ARRAYS, ALONG))


def test_a_layer_has_derivatives_of_both_orders() -> None:
    layer = anyattn.nn.Attention(12, 4, nheads_kv=2, causal=True, softcap=2.0, sink=True).double()

    def written_out(x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, 3)) for project in (layer.q, layer.k, layer.v))
        found: Tensor = layer.out(plain(q, k, v, 2.0, layer.sink).flatten(2))
        return found

    x, along = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    check(both_orders(layer, (x,), (along,)), both_orders(written_out, (x,), (along,)))


def test_behind_torchs_own_function_derivatives_raise() -> None:
    """torch's operator has no forward mode and no second derivative, whichever kernel computes it."""
    q, k, v = (x.transpose(1, 2) for x in (ARRAYS[1], *ARRAYS[1:]))

    def f(q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    with anyattn.compat.torch.use_anyattn():
        with pytest.raises(NotImplementedError, match="forward AD"):
            jvp(f, (q,), (q,))
        with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_flash_attention_for_cpu_back"):
            double_backward(f, q)


def compiled(f: Function, *, fullgraph: bool = False) -> Function:
    torch._dynamo.reset()
    found: Function = torch.compile(f, backend="aot_eager", fullgraph=fullgraph)
    return found


def dual_numbers(f: Function) -> Tensor:
    with fwd.dual_level():
        return fwd.unpack_dual(f(fwd.make_dual(ARRAYS[0], ALONG[0]))).tangent


def training_step(f: Function) -> Function:
    """MeanFlow: the tangent is a target."""

    def step(q: Tensor, tq: Tensor) -> Tensor:
        out, tangent = jvp(f, (q,), (tq,))
        return (out - tangent.detach()).square().sum()

    return step


def gradient(step: Function) -> Tensor:
    with torch.enable_grad():
        leaf = ARRAYS[0].clone().requires_grad_()
        return torch.autograd.grad(step(leaf, ALONG[0]), leaf)[0]


Compile = Callable[[Function], Function]
# Each way gets attention, and a function that compiles.
COMPILED: dict[str, Callable[[Function, Compile], Any]] = {
    "jvp inside": lambda f, c: c(lambda q, t: jvp(f, (q,), (t,)))(ARRAYS[0], ALONG[0]),
    "jvp outside": lambda f, c: jvp(c(f), ARRAYS[:1], ALONG[:1]),
    "dual numbers inside": lambda f, c: [c(lambda: dual_numbers(f))()],
    "dual numbers outside": lambda f, c: [dual_numbers(c(f))],
    "jvp of grad": lambda f, c: c(lambda q, t: jvp(grad(loss(f)), (q,), (t,)))(ARRAYS[0], ALONG[0]),
    "vmap of jvp": lambda f, c: [
        c(lambda q, t: vmap(lambda q, t: jvp(f, (q,), (t,))[1])(q, t))(  # noqa: PLW0108 (compiles vmap too)
            ARRAYS[0][:, None], ALONG[0][:, None]
        )
    ],
    "training": lambda f, c: [gradient(c(training_step(f)))],
}


def attend(attention: Function) -> Function:
    return lambda q: attention(q, *(x[: len(q)] for x in ARRAYS[1:]))


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_compiled_programs_break_the_graph_and_are_right(way: str, grad_enabled: bool) -> None:
    with torch.set_grad_enabled(grad_enabled), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the transforms that it does not trace
        got = COMPILED[way](attend(FUNCTIONS["attention"]), compiled)
        check(got, COMPILED[way](attend(plain), lambda f: f))


@pytest.mark.parametrize("way", COMPILED)
def test_one_graph_for_derivatives_is_refused(way: str) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        COMPILED[way](attend(FUNCTIONS["attention"]), lambda f: compiled(f, fullgraph=True))


def test_second_derivatives_of_a_compiled_function_raise() -> None:
    """torch.compile has none."""
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        double_backward(compiled(attend(FUNCTIONS["attention"])), ARRAYS[0])
