"""Scalars come in every form: what each form means, and what is refused."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import anyattn
from anyattn import scalars
from anyattn.runtime import dispatch
from harness.tensors import close, normal

HALF: list[Any] = [
    0.5,
    Fraction(1, 2),
    np.float16(0.5),
    np.float32(0.5),
    np.float64(0.5),
    ml_dtypes.bfloat16(0.5),
    np.array(0.5),
    np.array([[0.5]], np.float32),
    torch.tensor(0.5),
    torch.tensor([0.5], dtype=torch.bfloat16),
    torch.nn.Parameter(torch.tensor(0.5), requires_grad=False),
    torch.tensor(0.5, requires_grad=True).detach(),
]
THREE: list[Any] = [3, np.int8(3), np.uint64(3), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3])]
TRUE: list[Any] = [True, 1, np.bool_(True), np.array(True), torch.tensor(True), torch.tensor([1])]


@pytest.mark.parametrize(
    "read, forms, want",
    [(scalars.real, HALF, 0.5), (scalars.real, THREE, 3.0), (scalars.integer, THREE, 3), (scalars.flag, TRUE, True)],
)
def test_every_form_becomes_a_python_value(read: Any, forms: list[Any], want: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [read("name", x) for x in forms]
    assert all(type(x) is type(want) and x == want for x in found)


@pytest.mark.parametrize("read", [scalars.real, scalars.integer, scalars.flag])
@pytest.mark.parametrize(
    "wrong",
    [None, "1", (1,), [], 1j, np.array([1, 2]), np.array([]), np.str_("1"), torch.ones(2), torch.zeros(0), {}],
    ids=repr,
)
def test_other_objects_are_refused_by_name(read: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^softcap must be"):
        read("softcap", wrong)


@pytest.mark.parametrize("read", [scalars.integer, scalars.flag])
@pytest.mark.parametrize("wrong", [1.0, np.float32(1), torch.tensor(1.0)], ids=repr)
def test_fraction_is_refused_as_an_integer(read: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^window must be"):
        read("window", wrong)


def test_number_beyond_the_range_of_float_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^scale must be finite"):
        scalars.real("scale", 10**400)


def test_a_scale_that_needs_a_gradient_is_refused() -> None:
    x, scale = normal(1, 4, 2, 8), torch.tensor(0.5, requires_grad=True)
    for call in (
        lambda: anyattn.attention(x, x, x, scale=scale),
        lambda: anyattn.sdpa(x, x, x, scale=scale),
        lambda: anyattn.flash_attention(x, x, x, scale=scale),
    ):
        with pytest.raises(TypeError, match=r"scale must not require a gradient"):
            call()
    with torch.no_grad():
        assert torch.equal(anyattn.attention(x, x, x, scale=scale), anyattn.attention(x, x, x, scale=0.5))


def test_a_scale_whose_value_is_unknown_is_refused() -> None:
    x = normal(1, 4, 2, 8)
    with pytest.raises(TypeError, match="scale must be one number, got a tensor whose value cannot be read here"):
        anyattn.attention(x, x, x, scale=torch.ones((), device="meta"))
    with pytest.raises(TypeError, match="scale must be one number, got a tensor whose value cannot be read here"):
        torch.vmap(lambda scale: anyattn.attention(x, x, x, scale=scale))(torch.ones(3))


def test_a_tensor_is_read_at_every_call() -> None:
    """Plans are cached by their scalars: a tensor whose value changes must not find the plan of the first one."""
    x, scale = normal(1, 4, 2, 8), torch.tensor(0.5)
    assert torch.equal(anyattn.attention(x, x, x, scale=scale), anyattn.attention(x, x, x, scale=0.5))
    scale.fill_(0.25)
    assert torch.equal(anyattn.attention(x, x, x, scale=scale), anyattn.attention(x, x, x, scale=0.25))


def test_forms_of_one_value_share_a_plan() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 8))
    anyattn.attention(x, x, x, scale=0.5, chunk=3, window=(3, 3))
    found: list[Any] = []
    original = dispatch.lookup

    def lookup(key: Any, *rest: Any) -> Any:
        found.append(key)
        return original(key, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "lookup", lookup)
        for half, three in ((0.5, 3), (np.float16(0.5), np.int8(3)), (torch.tensor(0.5), torch.tensor(3))):
            anyattn.attention(x, x, x, scale=half, chunk=three, window=(three, three))
    assert len(found) == 3
    assert len(set(found)) == 1


@pytest.mark.parametrize("gradient", [False, True])
def test_compiled_functions_read_a_tensor(gradient: bool) -> None:
    """Compile to one graph if Dynamo keeps the value as a symbol, else with a graph break."""
    x = torch.randn(1, 4, 2, 8).requires_grad_(gradient)

    def call(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return anyattn.attention(x, x, x, scale=scale) + anyattn.sdpa(x, x, x, scale=scale)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for scale in (torch.tensor(1 / math.sqrt(2)), torch.tensor(0.1)):
            close(compiled(x, scale), call(x, scale), rtol=0, atol=0)
            if gradient:
                got, want = (torch.autograd.grad(f(x, scale).sum(), x)[0] for f in (compiled, call))
                close(got, want, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    close(torch.compile(call, backend="eager")(x, scale), call(x, scale), rtol=0, atol=0)
