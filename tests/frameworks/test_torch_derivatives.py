"""Forward mode and second derivatives of torch: every order of transforms against attention written out in torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jvp, linearize, vmap

import anyattn
from anyattn.compat.flash_attn import flash_attn_func
from anyattn.frameworks.torch import fastpath
from anyattn.runtime import execute

Function = Callable[..., Tensor]
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    """Causal attention with all scores in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    s = 2.0 * torch.tanh(s / 2.0)
    s = s if bias is None else s + bias
    n_q, n_k = s.shape[-2:]
    s = s.masked_fill(torch.ones(n_q, n_k, dtype=torch.bool).triu(n_k - n_q + 1), -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(*s.shape[:-1], 1)], -1)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1)[..., :n_k], v)


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    return anyattn.attention(q, k, v, causal=True, softcap=2.0, bias=bias, sink=sink)


torch.manual_seed(0)
ARRAYS = tuple(
    torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 3), (2, 1, 5, 7), (4,))
)
ALONG = tuple(torch.randn_like(x) for x in ARRAYS)
EVERY = tuple(range(len(ARRAYS)))


def loss(f: Function) -> Function:
    return lambda *arrays: (f(*arrays) ** 3).sum()


def dual_numbers(f: Function) -> Any:
    with fwd.dual_level():
        return fwd.unpack_dual(f(*[fwd.make_dual(x, t) for x, t in zip(ARRAYS, ALONG, strict=True)])).tangent


def double_backward(f: Function) -> Any:
    leaves = [x.clone().requires_grad_() for x in ARRAYS]
    first = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum((x**2).sum() for x in first), leaves)


def weights_of_a_model(f: Function) -> Any:
    """MeanFlow: the tangent is a target, or is trained through."""
    q, k, v, *_ = ARRAYS
    w = torch.eye(6, dtype=torch.float64).requires_grad_()
    out, tangent = jvp(lambda x: f(x @ w, k, v), (q,), (ALONG[0],))
    target = torch.autograd.grad(((out - tangent.detach()) ** 2).sum(), w, retain_graph=True)
    return target, torch.autograd.grad((tangent**2).sum(), w)


WAYS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: jvp(f, ARRAYS, ALONG),
    "jvp of v alone": lambda f: jvp(lambda v: f(*ARRAYS[:2], v), ARRAYS[2:3], ALONG[2:3]),
    "dual numbers": dual_numbers,
    "linearize": lambda f: linearize(f, *ARRAYS)[1](*ALONG),
    "jacfwd": lambda f: jacfwd(lambda q: f(q, *ARRAYS[1:])[0, 2])(ARRAYS[0]),
    "hessian": lambda f: hessian(lambda q: loss(f)(q, *(x[:1] for x in ARRAYS[1:4])))(ARRAYS[0][:1]),
    "jvp of grad": lambda f: jvp(grad(loss(f), argnums=EVERY), ARRAYS, ALONG),
    "grad of jvp": lambda f: grad(lambda *xs: (jvp(f, xs, ALONG)[1] ** 2).sum(), argnums=EVERY)(*ARRAYS),
    "grad by tangents": lambda f: grad(lambda *ts: (jvp(f, ARRAYS, ts)[1] ** 2).sum(), argnums=EVERY)(*ALONG),
    "grad of grad": lambda f: grad(lambda q: (grad(loss(f))(q, *ARRAYS[1:]) ** 2).sum())(ARRAYS[0]),
    "double backward": double_backward,
    "vmap of jvp": lambda f: vmap(lambda q, t: jvp(lambda q: f(q, *ARRAYS[1:]), (q,), (t,))[1])(
        torch.stack([ARRAYS[0], ALONG[0]]), torch.stack([ALONG[0], ARRAYS[0]])
    ),
    "training by tangents": weights_of_a_model,
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


def with_lse(*arrays: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, bias, sink = arrays
    found: tuple[Tensor, Tensor] = anyattn.attention(q, k, v, bias=bias, sink=sink, causal=True, return_lse=True)
    return found


def test_gradcheck_passes_in_forward_mode_and_for_second_derivatives() -> None:
    small = (ARRAYS[0][:1, :3, :2], ARRAYS[1][:1, :4], ARRAYS[2][:1, :4], ARRAYS[3][:1, :, :3, :4], ARRAYS[4][:2])
    leaves = [x.clone().requires_grad_() for x in small]
    flags = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(
        with_lse, leaves, check_forward_ad=True, check_batched_forward_grad=True, fast_mode=False, **flags
    )
    assert torch.autograd.gradgradcheck(with_lse, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **flags)


def test_packed_sequences_and_other_functions_have_tangents() -> None:
    q, k, v, *_ = ARRAYS
    ones = torch.tensor([0, 3, 10], dtype=torch.int32)
    packed, along = (torch.cat([x[0, :5], x[1, :5]]) for x in (q, ALONG[0]))

    def f(x: Tensor) -> Tensor:
        return anyattn.attention_varlen(x, x, x, ones, ones, causal=True)

    def g(x: Tensor) -> Tensor:
        parts = [x[None, :3], x[None, 3:]]
        return torch.cat([anyattn.attention(p, p, p, causal=True)[0] for p in parts])

    for got, want in zip(jvp(f, (packed,), (along,)), jvp(g, (packed,), (along,)), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)
    calls: list[Function] = [
        lambda q, k, v: anyattn.attention(q, k, v, causal=True),
        lambda q, k, v: flash_attn_func(q, k, v, causal=True),
        lambda q, k, v: anyattn.sdpa(
            *(x.transpose(1, 2) for x in (q, k[:, 2:], v[:, 2:])), is_causal=True, enable_gqa=True
        ).transpose(1, 2),
    ]
    tangents = [jvp(call, (q, k, v), ALONG[:3])[1] for call in calls]
    torch.testing.assert_close(tangents[1], tangents[0], **TOLERANCE)
    short = jvp(lambda q, k, v: anyattn.attention(q, k[:, 2:], v[:, 2:], causal=True), (q, k, v), ALONG[:3])[1]
    torch.testing.assert_close(tangents[2], short, **TOLERANCE)


def test_tangents_of_parameters_equal_finite_differences() -> None:
    layer = anyattn.nn.Attention(16, 2).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in parameters.items()}

    def f(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(layer, parameters, (x,))
        return found

    _, tangent = jvp(f, (parameters,), (along,))
    ahead, behind = (f({name: p + h * along[name] for name, p in parameters.items()}) for h in (1e-6, -1e-6))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=0, atol=1e-8)


def test_dropout_drops_the_same_entries_in_the_tangent() -> None:
    """out is linear in v for given P and D."""
    q, k, v, *_ = ARRAYS
    state = torch.tensor([7, 0])

    def f(v: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, dropout_p=0.4, rng_state=state)

    _, tangent = jvp(f, (v,), (ALONG[2],))
    torch.testing.assert_close(tangent, f(ALONG[2]), **TOLERANCE)


def test_derivatives_of_third_order_raise() -> None:
    q, k, v, *_ = ARRAYS
    tangent = ALONG[:1]

    def f(q: Tensor) -> Tensor:
        return anyattn.attention(q, k, v).sum()

    with pytest.raises(NotImplementedError, match="no forward mode inside forward mode"):
        jvp(lambda q: jvp(f, (q,), tangent)[1], (q,), tangent)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        grad(lambda q: grad(lambda q: (grad(f)(q) ** 2).sum())(q).sum())(q)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        jvp(grad(lambda q: (grad(f)(q) ** 2).sum()), (q,), tangent)


def test_a_tangent_of_an_array_without_derivative_raises() -> None:
    q, k, v, *_ = ARRAYS
    slopes = torch.ones(4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="alibi_slopes must not have a tangent"):
        jvp(lambda slopes: anyattn.attention(q, k, v, alibi_slopes=slopes), (slopes,), (slopes,))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Number of calls of each pass."""
    found: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found[name] = found.get(name, 0) + 1
            return function(*arguments, **options)

        return call

    for name in ("forward", "backward", "tangent", "second", "forward_tangent"):
        monkeypatch.setattr(execute, name, counted(name, getattr(execute, name)))
    return found


def check(got: Any, want: Any) -> None:
    for a, b in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


FOLDED: dict[str, tuple[Callable[[Function], Any], dict[str, int]]] = {
    "jacfwd of q": (WAYS["jacfwd"], {"forward": 1, "tangent": 1}),
    "jacfwd of v": (lambda f: jacfwd(lambda v: f(*ARRAYS[:2], v)[0, 2])(ARRAYS[2]), {"forward": 1, "tangent": 1}),
    "jacfwd of bias": (
        lambda f: jacfwd(lambda bias: f(*ARRAYS[:3], bias)[0, 2])(ARRAYS[3]),
        {"forward": 1, "tangent": 1},
    ),
    "jacfwd of one bias": (
        lambda f: jacfwd(lambda bias: f(*ARRAYS[:3], bias)[0, 2])(ARRAYS[3][:1]),
        {"forward": 1, "tangent": 1},
    ),
    "hessian": (WAYS["hessian"], {"forward": 1, "tangent": 1, "backward": 2, "second": 1}),
    "vmap of jvp": (WAYS["vmap of jvp"], {"forward": 1, "tangent": 1}),
    "jacfwd of sink": (
        lambda f: jacfwd(lambda sink: f(*ARRAYS[:4], sink)[0, 2])(ARRAYS[4]),
        {"forward": 1, "tangent": len(ARRAYS[4])},
    ),
}


@pytest.mark.parametrize("way", FOLDED)
def test_samples_of_a_derivative_are_one_call(way: str, calls: dict[str, int]) -> None:
    """A sink is one number per head for the whole batch, so each sample needs a call of its own."""
    compute, want = FOLDED[way]
    check(compute(ours), compute(plain))
    assert calls == want


ONE_CALL: dict[str, dict[str, int]] = {
    "jvp": {"forward_tangent": 1},
    "jvp of v alone": {"forward_tangent": 1},
    "dual numbers": {"forward_tangent": 1},
    "grad of jvp": {"forward_tangent": 1, "second": 1},
    "grad by tangents": {"forward_tangent": 1, "second": 1, "backward": 1},
    "training by tangents": {"forward_tangent": 1, "second": 1, "backward": 2},
}


@pytest.mark.parametrize("way", ONE_CALL)
def test_a_forward_pass_and_its_tangent_are_one_call(way: str, calls: dict[str, int]) -> None:
    WAYS[way](ours)
    assert calls == ONE_CALL[way]


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_are_right_without_private_names_of_torch(
    way: str, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later torch may lack the names that show whether a forward pass and its tangent can be one call."""
    monkeypatch.setattr(fastpath, "AVAILABLE", False)
    check(WAYS[way](ours), WAYS[way](plain))
    assert "forward_tangent" not in calls


def test_a_missing_private_name_of_torch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch._C, "_is_fwd_grad_enabled"), (torch._C._functorch, "get_interpreter_stack")):
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            module = importlib.util.module_from_spec(fastpath.__spec__)
            fastpath.__spec__.loader.exec_module(module)
        assert not module.AVAILABLE


def test_a_linearized_function_computes_no_forward_pass(calls: dict[str, int]) -> None:
    _, tangent = linearize(ours, *ARRAYS)
    tangent(*ALONG)  # computes the parts of the graph that do not depend on the tangents
    calls.clear()
    check(tangent(*ALONG), jvp(plain, ARRAYS, ALONG)[1])
    assert calls == {"tangent": 1}


def test_attention_inside_a_function_with_its_own_tangent_has_none(calls: dict[str, int]) -> None:
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(q: Tensor) -> Tensor:
            return ours(q, *ARRAYS[1:])

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return torch.full((2, 5, 4, 3), 7.0, dtype=torch.float64)

    with fwd.dual_level():
        found = fwd.unpack_dual(Custom.apply(fwd.make_dual(ARRAYS[0], ALONG[0])))
    assert torch.equal(found.tangent, torch.full((2, 5, 4, 3), 7.0, dtype=torch.float64))
    assert calls == {"forward": 1}


def test_gradients_of_gradients_do_not_pass_through_out_and_lse(calls: dict[str, int]) -> None:
    leaves = [x.clone().requires_grad_() for x in ARRAYS]
    first = torch.autograd.grad(ours(*leaves).sum(), leaves, create_graph=True)
    torch.autograd.grad(sum((x**2).sum() for x in first), leaves)
    assert calls == {"forward": 1, "backward": 1, "second": 1}


def test_explicit_functions_under_vmap(calls: dict[str, int]) -> None:
    q, k, v, *_ = ARRAYS
    out, lse = anyattn.attention_forward(q, k, v)
    samples = torch.stack([q, ALONG[0], ARRAYS[0] + 1])

    def tangent(tq: Tensor) -> tuple[Tensor, Tensor]:
        return anyattn.attention_tangent(q, k, v, out, lse, tq=tq)

    def second(tq: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in anyattn.attention_second(out, q, k, v, out, lse, tq=tq) if x is not None)

    calls.clear()
    for function in (tangent, second):
        got, want = vmap(function)(samples), [function(tq) for tq in samples]
        check(got, [torch.stack(parts) for parts in zip(*want, strict=True)])
    assert calls == {"tangent": 1 + len(samples), "second": 1 + len(samples)}
