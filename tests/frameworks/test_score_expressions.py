"""Functions that are traced once: their graph from an earlier call equals that of a new tracing, after any change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from anyattn.definition.score import expressions
from anyattn.frameworks.torch import score_functions

SIZE = 16
limit = 3
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Function]:
    """Forget what is known, and return the list of the functions that are traced from now on."""
    found: list[Function] = []
    trace = score_functions._trace

    def record(score_mod: Function, mask_mod: Function, compute: torch.dtype) -> Any:
        found.extend(one for one in (score_mod, mask_mod) if one is not None)
        return trace(score_mod, mask_mod, compute)

    monkeypatch.setattr(score_functions, "_trace", record)
    monkeypatch.setattr(expressions, "_known", {})
    return found


def documents(table: Any, last: Any = 0) -> Function:
    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        return (table[q_idx] == table[kv_idx]) & (distance >= last)

    return mask


def added(x: Any, y: Any) -> Function:
    return lambda score, b, h, q_idx, kv_idx: score * -x[q_idx] + y[kv_idx]


def check(score_mod: Function | None, mask_mod: Function | None = None) -> None:
    """Compare with a new tracing: the graph, and the arrays themselves."""
    found = score_functions.traced(score_mod, mask_mod)
    new = score_functions.trace_functions(score_mod, mask_mod, score_functions._Reads)
    assert found.graph == new.graph
    assert found.graph.text == new.graph.text  # 0 and 0.0 differ
    assert len(found.arrays) == len(new.arrays)
    assert all(a is b for a, b in zip(found.arrays, new.arrays, strict=True))


def test_an_expression_is_traced_once(traced: list[Function]) -> None:
    for _ in range(3):
        check(None, documents(torch.arange(SIZE)))
        check(added(torch.ones(SIZE), torch.zeros(SIZE)))
    assert len(traced) == 2


def test_both_functions_together(traced: list[Function]) -> None:
    table = torch.ones(SIZE)
    for x in (table, torch.ones(SIZE)):  # once, one array in both functions; then two arrays
        for _ in range(2):
            check(added(x, table), documents(table))
    assert len(traced) == 4


CHANGES: dict[str, tuple[Any, Any]] = {
    "number": (1, 2),
    "kind of number": (1, True),
    "integer and float": (0, 0.0),
    "sign of zero": (0.0, -0.0),
    "number and tensor": (1, torch.tensor(1)),
    "shape": (torch.zeros(SIZE), torch.zeros(SIZE + 1)),
    "dtype": (torch.zeros(SIZE), torch.zeros(SIZE, dtype=torch.int64)),
    "gradient": (torch.zeros(SIZE), torch.zeros(SIZE, requires_grad=True)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_variables_are_traced_again(name: str, traced: list[Function]) -> None:
    table, arrays = torch.arange(SIZE), torch.ones(SIZE)
    for value in (*CHANGES[name], *CHANGES[name]):
        if isinstance(value, torch.Tensor) and value.ndim:
            check(added(value, arrays))
        else:
            check(None, documents(table, value))
    assert len(traced) == 2


def test_one_array_or_two(traced: list[Function]) -> None:
    x, y = torch.ones(SIZE), torch.ones(SIZE)
    for pair in ((x, y), (x, x), (y, x), (y, y)):
        check(added(*pair))
    assert len(traced) == 2


def test_a_global_variable_and_a_default(monkeypatch: pytest.MonkeyPatch, traced: list[Function]) -> None:
    table = torch.arange(SIZE)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, table: Any = table) -> Any:
        return table[q_idx] - table[kv_idx] < limit

    for value in (3, 4, 3, torch.tensor(5)):
        monkeypatch.setitem(globals(), "limit", value)
        check(None, mask)
    mask.__defaults__ = (torch.arange(SIZE + 2),)
    check(None, mask)
    assert len(traced) == 4


def changing() -> Function:
    table = torch.zeros(SIZE)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        values = table
        values += 1
        return score + values[q_idx]

    return score_mod


class Offset:
    value = 1


OTHERS: dict[str, Function] = {
    "call": lambda score, b, h, q_idx, kv_idx: score + abs(q_idx - kv_idx),
    "attribute": lambda score, b, h, q_idx, kv_idx: score + Offset.value,
    "branch": lambda score, b, h, q_idx, kv_idx: score + 1 if limit > 2 else score,
    "write": changing(),
    "method": lambda score, b, h, q_idx, kv_idx: score.exp(),
    "arguments": lambda *arguments: arguments[0] * 2,
    "object": lambda score, b, h, q_idx, kv_idx: score + CHANGES["number"][0],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_traced_at_every_call(name: str, traced: list[Function]) -> None:
    for _ in range(3):
        score_functions.traced(OTHERS[name], None)
    assert len(traced) == 3
    assert not expressions._known


def test_an_array_that_an_operator_computes(traced: list[Function]) -> None:
    table = torch.arange(SIZE)
    for shift in (1, 1, 2):
        found = score_functions.traced(None, lambda b, h, q_idx, kv_idx, shift=shift: (table + shift)[q_idx] > kv_idx)
        assert torch.equal(found.arrays[0], table + shift)
    assert len(traced) == 3


def test_a_mode_sees_every_call(traced: list[Function]) -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            seen.append(function)
            return function(*arguments, **(keywords or {}))

    mask = documents(torch.arange(SIZE))
    check(None, mask)
    with Mode():
        score_functions.traced(None, mask)
    assert len(traced) == 2


def test_no_more_graphs_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "LARGEST", 5)
    table = torch.arange(SIZE)
    for last in range(12):
        check(None, documents(table, last))
    assert 0 < len(expressions._known) <= 5


@pytest.mark.parametrize("causal", [True, False])
def test_new_values_of_known_functions(causal: bool) -> None:
    import anyattn

    q, k, v = torch.randn(3, 1, SIZE, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    for seed in range(3):
        table = torch.randint(0, 3, (SIZE,), generator=torch.Generator().manual_seed(seed))
        seen = (table[:, None] == table) & (torch.ones(SIZE, SIZE).tril().bool() if causal else True)
        last = 0 if causal else -SIZE
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        out = anyattn.attention(q, k, v, mask_mod=documents(table, last))
        torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", weights, v), rtol=1e-12, atol=1e-12)
