"""Tensors that are not what their memory holds: each is understood, or refused by its argument's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import anyattn
from anyattn.compat.torch import use_anyattn
from harness.plain_torch import plain_attention
from harness.tensors import close, ints, leaf, normal, qkv

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes of torch


class Label(Tensor):
    """A subclass that adds a name and nothing else."""


class Silent(Tensor):
    """A subclass without torch functions, as Parameter is."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Meaning(Tensor):
    """A subclass that defines functions; what its memory holds is its own affair, as for CausalBias."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Doubled(Tensor):
    """A wrapper that stands for twice the tensor inside; it computes every operator on its value."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def value(x: Any) -> Any:
            return 2 * x.inner if isinstance(x, Doubled) else x

        return func(*(value(x) for x in args), **{name: value(x) for name, x in (kwargs or {}).items()})


class Unknown(Doubled):
    """A wrapper that knows no operator, like one of quantised weights."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


READ: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {  # a kind of tensor, and what it stands for
    "parameter": lambda x: (torch.nn.Parameter(x.clone(), requires_grad=False), x),
    "label": lambda x: (x.as_subclass(Label), x),
    "silent": lambda x: (x.as_subclass(Silent), x),
    "wrapper": lambda x: (Doubled(x), 2 * x),
    "buffer": lambda x: (torch.nn.Buffer(x), x) if hasattr(torch.nn, "Buffer") else (x, x),
    "negative view": lambda x: (torch._neg_view(x), -x),
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "functions": lambda x: x.as_subclass(Meaning),
    "wrapper": Unknown,
    "masked": lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "nested": lambda x: torch.nested.as_nested_tensor([x[0]], layout=torch.jagged),
    "nested, strided": lambda x: torch.nested.as_nested_tensor([x[0]]),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "opaque": lambda x: x.float().to_mkldnn(),
    "meta": lambda x: x.to("meta"),
}
CU = ints(0, 5, 10)
ARRAYS: dict[str, Callable[..., Any]] = {
    "q": lambda change: anyattn.attention(change(qkv(5, 5)[0]), *qkv(5, 5)[1:]),
    "k": lambda change: anyattn.attention(qkv(5, 5)[0], change(qkv(5, 5)[1]), qkv(5, 5)[2]),
    "v": lambda change: anyattn.attention(*qkv(5, 5)[:2], change(qkv(5, 5)[2])),
    "bias": lambda change: anyattn.attention(*qkv(5, 5), bias=change(normal(2, 4, 5, 5))),
    "alibi_slopes": lambda change: anyattn.attention(*qkv(5, 5), alibi_slopes=change(normal(2, 4))),
    "packed q": lambda change: anyattn.attention_varlen(change(qkv(5, 5)[0].flatten(0, 1)), *packed(), CU, CU),
    "cached q": lambda change: anyattn.attention_with_kvcache(change(qkv(5, 5)[0]), *qkv(5, 5)[1:], cache_seqlens=5),
    "query": lambda change: anyattn.sdpa(change(sdpa_inputs()[0]), *sdpa_inputs()[1:]),
    "attn_mask": lambda change: anyattn.sdpa(*sdpa_inputs(), change(normal(2, 4, 5, 5))),
    "dout": lambda change: backward(dout=change),
    "lse": lambda change: backward(lse=change),
}


def packed() -> list[Tensor]:
    return [x.flatten(0, 1) for x in qkv(5, 5)[1:]]


def sdpa_inputs() -> list[Tensor]:
    return [normal(2, 4, 5, 8, seed=seed) for seed in range(3)]


def backward(**changes: Callable[[Tensor], Tensor]) -> Any:
    inputs = qkv(5, 5)
    out, lse = anyattn.attention_forward(*inputs)
    saved = {"dout": torch.ones_like(out), "out": out, "lse": lse}
    saved |= {name: change(saved[name]) for name, change in changes.items()}
    return anyattn.attention_backward(saved["dout"], *inputs, saved["out"], saved["lse"])[0]


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("name", ARRAYS)
def test_tensor_is_read_by_its_meaning(name: str, kind: str) -> None:
    got = ARRAYS[name](lambda x: READ[kind](x)[0])
    want = ARRAYS[name](lambda x: READ[kind](x)[1])
    close(got.as_subclass(Tensor) if isinstance(got, (Label, Silent)) else got, want)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ARRAYS)
def test_unsupported_tensor_is_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        ARRAYS[name](REFUSED[kind])


def test_gradient_reaches_the_tensor() -> None:
    label = leaf(2, 5, 4, 8).detach().as_subclass(Label).requires_grad_()
    plain = label.detach().as_subclass(Tensor).clone().requires_grad_()
    grads = [
        torch.autograd.grad(anyattn.attention(x, *qkv(5, 5)[1:]).as_subclass(Tensor).square().sum(), x)[0]
        for x in (label, plain)
    ]
    close(grads[0].as_subclass(Tensor), grads[1])


def test_fake_tensors_give_fake_results() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k, v = qkv()
        out = anyattn.attention(q, k, v, mask=torch.ones(5, 7, dtype=torch.bool))
    assert isinstance(out, torch._subclasses.FakeTensor)
    assert out.shape == (2, 5, 4, 6)


TRIANGLES = {
    "lower right": (causal_lower_right, "bottom-right"),
    "upper left": (causal_upper_left, "top-left"),
}


@pytest.mark.parametrize("triangle", TRIANGLES.values(), ids=TRIANGLES)
@pytest.mark.parametrize("rows, keys", [(5, 9), (9, 5), (5, 5)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_causal_bias_of_torch_is_computed(
    triangle: tuple[Any, str], rows: int, keys: int, options: dict[str, Any], recwarn: Any
) -> None:
    """Check result and gradients, through sdpa and torch's own function. Rows without keys give 0."""
    make, alignment = triangle
    nheads_kv = 2 if options.get("enable_gqa") else 4
    shapes = ((2, 4, rows, 8), (2, nheads_kv, keys, 8), (2, nheads_kv, keys, 8))
    inputs = [leaf(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    heads_last = [x.transpose(1, 2) for x in inputs]
    want = plain_attention(*heads_last, causal=True, alignment=alignment, scale=options.get("scale"))[0].transpose(1, 2)
    functions: list[Any] = [anyattn.sdpa]
    if rows <= keys or alignment == "top-left":  # torch's own path gives NaN to the others
        functions.append(hooked)
    for function in functions:
        out = function(*inputs, make(rows, keys), **options)
        close(out, want)
        weights = normal(*out.shape, seed=9)
        close(*(torch.autograd.grad(x, inputs, weights, retain_graph=True) for x in (out, want)))


def hooked(*arguments: Any, **keywords: Any) -> Tensor:
    with use_anyattn():
        return F.scaled_dot_product_attention(*arguments, **keywords)


def test_causal_bias_works_in_compiled_functions() -> None:
    query, key = normal(1, 2, 4, 8), normal(1, 2, 6, 8)
    for make in (causal_lower_right, causal_upper_left):
        triangle = make(4, 6)

        def call(query: Tensor, key: Tensor, triangle: Any = triangle) -> Tensor:
            return anyattn.sdpa(query, key, key, triangle)

        close(torch.compile(call, backend="aot_eager", fullgraph=True)(query, key), call(query, key))


def test_causal_bias_of_a_wrong_shape_or_argument_is_refused() -> None:
    query, triangle = normal(1, 2, 4, 8), causal_lower_right(4, 4)
    with pytest.raises(ValueError, match="must be a CausalBias of 4 queries and 4 keys, got one of 4 queries and 6"):
        anyattn.sdpa(query, query, query, causal_upper_left(4, 6))
    with pytest.raises(ValueError, match="attn_mask cannot be combined with is_causal"):
        anyattn.sdpa(query, query, query, triangle, is_causal=True)
    rows = query.transpose(1, 2)
    for name in ("bias", "mask"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor whose values can be read, got CausalBias"):
            anyattn.attention(rows, rows, rows, **{name: triangle})
