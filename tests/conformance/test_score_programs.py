"""Random mask functions: torch computes the same pairs, tiles that are skipped are empty, and the CPU engine agrees."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import anyattn
from anyattn.definition.score.blocks import EMPTY, FULL, Sizes, classify
from anyattn.frameworks.torch.score_functions import traced

SIZES = Sizes(2, 2, 45, 70)  # batch, nheads, seqlen_q, seqlen_k
AXES = tuple(enumerate(SIZES))
BLOCK = (9, 10)
Function = Callable[..., Any]


class Programs:
    """Random functions of (b, h, q_idx, kv_idx), with values of one kind."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        floats = torch.randn(80, generator=generator)
        special = floats.clone()
        special[torch.randint(0, 80, (4,), generator=generator)] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0])
        self.floats = [floats, special, (4 * floats).round() / 4]
        self.integers = [torch.randint(low, high, (80,), generator=generator) for low, high in ((-3, 4), (0, 80))]
        self.integers.append(torch.sort(self.integers[0])[0])
        self.booleans = [torch.rand(80, generator=generator) < share for share in (0.05, 0.5, 0.95)]

    def read(self, arrays: list[torch.Tensor]) -> Function:
        array, axis = self.random.choice(arrays), self.random.choice((2, 3))
        return lambda *pair: array[pair[axis]]

    def integer(self, depth: int) -> Function:
        if depth == 0:
            axis = self.random.choice((0, 1, 2, 2, 3, 3))
            return self.random.choice((lambda *pair: pair[axis], self.read(self.integers)))
        kind = self.random.choice(("unary", "binary", "constant", "where", "float", "read"))
        x, y, constant = self.integer(depth - 1), self.integer(depth - 1), self.random.choice((1, 3, 4, 8, -3))
        if kind == "constant":
            function = self.random.choice(
                (lambda a: a // constant, lambda a: a % constant, lambda a: a >> abs(constant))
            )
            return lambda *pair: function(x(*pair))
        if kind == "unary":
            function = self.random.choice((torch.abs, torch.neg, torch.sign, lambda a: a << 2, lambda a: ~a))
            return lambda *pair: function(x(*pair))
        if kind == "float":  # a cast of NaN is not defined
            number = self.number(depth - 1)
            return lambda *pair: torch.clamp(torch.fmax(number(*pair), torch.tensor(-99.0)), -99, 99).int()
        if kind == "read":
            array = self.random.choice(self.integers)
            return lambda *pair: array[torch.clamp(x(*pair), 0, 79)]
        if kind == "where":
            condition = self.boolean(depth - 1)
            return lambda *pair: torch.where(condition(*pair), x(*pair), y(*pair))
        names = ("add", "sub", "mul", "minimum", "maximum", "bitwise_and", "bitwise_or", "bitwise_xor")
        binary = getattr(torch, self.random.choice(names))
        return lambda *pair: binary(x(*pair), y(*pair))

    def number(self, depth: int) -> Function:
        if depth == 0:
            return self.read(self.floats)
        x, y = self.number(depth - 1), self.number(depth - 1)
        kind = self.random.choice(("unary", "binary", "where", "integer"))
        if kind == "unary":
            function = getattr(torch, self.random.choice(("abs", "neg", "sqrt", "floor", "ceil", "round", "relu")))
            return lambda *pair: function(x(*pair))
        if kind == "integer":
            integer = self.integer(depth - 1)
            return lambda *pair: integer(*pair) / 4
        if kind == "where":
            condition = self.boolean(depth - 1)
            return lambda *pair: torch.where(condition(*pair), x(*pair), y(*pair))
        names = ("add", "sub", "mul", "div", "minimum", "maximum", "fmin", "fmax", "remainder")
        binary = getattr(torch, self.random.choice(names))
        return lambda *pair: binary(x(*pair), y(*pair))

    def boolean(self, depth: int) -> Function:
        if depth == 0:
            return self.read(self.booleans)
        kind = self.random.choice(("integer", "integer", "number", "binary", "not"))
        if kind in ("integer", "number"):
            x, y = (getattr(self, kind)(depth - 1) for _ in range(2))
            compare = getattr(torch, self.random.choice(("lt", "le", "gt", "ge", "eq", "ne")))
            return lambda *pair: compare(x(*pair), y(*pair))
        x, y = self.boolean(depth - 1), self.boolean(depth - 1)
        if kind == "not":
            return lambda *pair: torch.logical_not(x(*pair))
        names = ("logical_and", "logical_or", "logical_xor", "eq", "mul", "add")
        binary = getattr(torch, self.random.choice(names))
        return lambda *pair: binary(x(*pair), y(*pair))


@pytest.mark.parametrize("seed", range(80))
def test_random_masks_are_those_of_torch_and_skip_no_visible_pair(seed: int) -> None:
    programs = Programs(seed)
    mask_mod = programs.boolean(programs.random.randint(1, 4))
    q, k = (torch.randn(2, n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in SIZES[2:])
    want = mask_mod(*[torch.arange(n).reshape([-1 if one == axis else 1 for one in range(4)]) for axis, n in AXES])
    expected = anyattn.attention(q, k, k, mask=want.expand(SIZES))
    for backend in ("cpu", "numpy"):
        try:
            with anyattn.backend(backend):
                out = anyattn.attention(q, k, k, mask_mod=mask_mod)
        except ValueError as error:
            assert "must fit in int32" in str(error)  # few programs
            return
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    known = traced(None, mask_mod)
    kinds = classify(known.graph, [x.numpy() for x in known.arrays], SIZES, BLOCK)
    tiles = want.expand(SIZES).numpy().reshape(2, 2, 5, 9, 7, 10).swapaxes(3, 4)
    assert not tiles.any((4, 5))[kinds == EMPTY].any()
    assert tiles.all((4, 5))[kinds == FULL].all()
