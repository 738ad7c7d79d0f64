"""Tests of the functions that a score function may call: torch computes the same from tensors of indices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import anyattn
from anyattn.definition.score.evaluate import Functions, Place
from anyattn.frameworks.torch.score_functions import traced

N = 24
SCORES = torch.cat([torch.linspace(-4, 4, N - 4, dtype=torch.float64), torch.tensor([0.0, math.nan, math.inf, 2.5])])
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "logical_not_of_integers": lambda s, i, j: torch.logical_not((i - j) % 3) * 1.0,
    "logical_xor_of_integers": lambda s, i, j: torch.logical_xor((i - j) % 3, j % 4) * 1.0,
    "sum_of_booleans": lambda s, i, j: ((i >= j) + (j % 2 == 0)) * 1.0,
    "product_of_booleans": lambda s, i, j: ((i >= j) * (j % 2 == 0)) * 1.0,
    "largest_of_booleans": lambda s, i, j: torch.where(torch.maximum(i >= j, j % 2 == 0), 1.0, 2.0),
    "boolean_plus_integer": lambda s, i, j: ((i >= j) + 1) * 1.0,
    "uint8": lambda s, i, j: ((i - j) * 40).to(torch.uint8) * 1.0,
    "int8": lambda s, i, j: ((i - j) * 40).to(torch.int8) * 1.0,
    "int16": lambda s, i, j: ((i - j) * 9000).short() * 1.0,
    "uint8_of_booleans": lambda s, i, j: (i > j).to(torch.uint8) * 1.0,
    "relu": lambda s, i, j: functional.relu(s),
    "relu_of_integers": lambda s, i, j: torch.relu(i - j) // 2 * 1.0,
    "silu": lambda s, i, j: functional.silu(s),
    "fmin": lambda s, i, j: torch.fmin(s, torch.ones_like(s)),
    "fmax": lambda s, i, j: torch.fmax(torch.sqrt(s), s),
    "floor_of_integers": lambda s, i, j: torch.floor(i) // 5 * 1.0,
    "ceil_of_integers": lambda s, i, j: torch.ceil(j) // 5 * 1.0,
    "keywords": lambda s, i, j: torch.where(condition=i > j, input=s, other=torch.maximum(input=s, other=-s)),
    "keyword_of_power": lambda s, i, j: torch.pow(torch.add(s, other=i, alpha=2), exponent=2),
    "new_full": lambda s, i, j: s * s.new_full((), 0.5),
    "type_as": lambda s, i, j: i.type_as(s) / 3,
    "dtype_of_another": lambda s, i, j: i.to(s) / 4,
    "least": lambda s, i, j: torch.where(i > j, s, torch.finfo(s.dtype).min),
    "dtypes": lambda s, i, j: 0.5 * i.to(s.dtype) + (s > 0).to(dtype=i.dtype),
    "full_like": lambda s, i, j: torch.full_like(s, -2.0) + torch.full_like(i, 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compute_what_torch_computes(name: str) -> None:
    function = FUNCTIONS[name]
    graph = traced(lambda s, b, h, i, j: function(s, i, j), None, torch.float64).graph
    found = Functions(graph, None, None, "float64")
    scores = SCORES.expand(N, N)
    want = function(scores, torch.arange(N)[:, None], torch.arange(N)).double().expand(N, N)
    result = found.score(scores.numpy(), Place(0, 0, np.arange(N)[:, None], np.arange(N)))
    np.testing.assert_allclose(result, want, rtol=1e-14)


REFUSED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "largest_of_one": (lambda s, j: s.max(), TypeError, "max with these arguments .* missing a required argument"),
    "decimals": (lambda s, j: torch.round(s, decimals=1), TypeError, "round with these arguments .* 'decimals'"),
    "digits": (lambda s, j: round(s, 1), TypeError, "round with these arguments"),
    "isin": (lambda s, j: s * torch.isin(j, torch.tensor([1])), NotImplementedError, "isin is not supported"),
    "in_place": (lambda s, j: functional.relu(s, inplace=True), NotImplementedError, "must not write"),
    "size": (lambda s, j: s.new_full((2,), 1.0), NotImplementedError, "one number, not an array"),
    "rand": (lambda s, j: s + torch.rand(()), NotImplementedError, "rand draws its numbers once"),
    "rand_like": (lambda s, j: s + torch.rand_like(s), NotImplementedError, "rand_like draws its numbers once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_arguments_and_random_numbers_are_refused_with_the_line(name: str) -> None:
    function, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        traced(lambda s, b, h, i, j: function(s, j), None)
    assert f"{__file__}:" in str(raised.value)


def test_captured_arrays_can_be_iterated_and_do_not_decide_branches() -> None:
    table, flag = anyattn.captured(np.arange(6.0).reshape(2, 3)), anyattn.captured(np.array(False))
    functions = traced(lambda s, b, h, i, j: s + sum(row[j] for row in table) * len(table), None)
    found = Functions(functions.graph, np.arange(6.0), None, "float64")
    result = found.score(np.zeros((1, 3)), Place(0, 0, np.zeros((1, 1), int), np.arange(3)))
    assert result.tolist() == [[6.0, 10.0, 14.0]]
    with pytest.raises(TypeError, match="must not branch on a traced value"):
        traced(lambda s, b, h, i, j: s if flag else 0, None)
    with pytest.raises(TypeError, match="must be read with one index per axis"):
        traced(lambda s, b, h, i, j: s if table else 0, None)


def test_unsigned_integers_must_fit_in_int32() -> None:
    q = torch.ones(1, 3, 1, 4)
    for dtype, value in ((torch.uint32, 2**31), (torch.uint64, 2**31), (torch.uint64, 2**64 - 1)):
        table = torch.tensor([0, value, 0], dtype=dtype)
        with pytest.raises(ValueError, match="a captured tensor of integers must fit in int32"):
            anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j, x=table: s + x[j])
        small = torch.tensor([0, 1, 0], dtype=dtype)
        assert anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j, x=small: s + x[j]).isfinite().all()


def test_an_index_from_exact_numbers_is_bounded_exactly() -> None:
    q, table = torch.ones(1, 6, 1, 4), torch.zeros(3)
    anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: s + table[torch.floor(j / 2 + 1).int() - 1])
    anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: s + table[((torch.log(j) * 3).int() + 1).clamp(0, 2)])
    anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: s + table[((i - j) & 3).clamp(max=2)])
    anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: s + (i - j).to(torch.int8))
    with pytest.raises(ValueError, match="must be from 0 to 2 on axis 0, got 0 to 3"):
        anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: s + table[torch.floor((j + 1) / 2).int()])


def test_shifts_beyond_the_bits_of_an_integer_raise() -> None:
    q = torch.ones(1, 6, 1, 4)
    for low, high in ((-2, 3), (27, 32)):
        with pytest.raises(ValueError, match=f"a shift .* by 0 to 31 bits, got {low} to {high}"):
            anyattn.attention(q, q, q, score_mod=lambda s, b, h, i, j, low=low: s + (i >> (j + low)))


def t5_bucket(distance: Any, bidirectional: bool, buckets: int, largest: int) -> Any:
    """Return the bucket of a relative position, as in T5. Values of a branch that is not taken may be no buckets."""
    first: Any = 0
    if bidirectional:
        buckets //= 2
        first = (distance > 0).to(torch.long) * buckets
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = buckets // 2
    share = torch.log(distance.float() / exact) / math.log(largest / exact)
    far = torch.min(exact + (share * (buckets - exact)).to(torch.long), torch.full_like(distance, buckets - 1))
    return first + torch.where(distance < exact, distance, far)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_branch_may_leave_an_array_where_it_is_not_taken(bidirectional: bool) -> None:
    q, k = (torch.randn(1, n, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (70, 90))
    table = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(90) - torch.arange(70)[:, None]
    bias = table[t5_bucket(distance, bidirectional, 32, 40)].permute(2, 0, 1)[None]
    found = anyattn.attention(
        q, k, k, score_mod=lambda s, b, h, i, j: s + table[t5_bucket(j - i, bidirectional, 32, 40), h]
    )
    torch.testing.assert_close(found, anyattn.attention(q, k, k, bias=bias), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="must be from 0 to 30 on axis 0, got 0 to 31"):
        anyattn.attention(
            q, k, k, score_mod=lambda s, b, h, i, j: s + table[:31][t5_bucket(j - i, bidirectional, 32, 40), h]
        )
