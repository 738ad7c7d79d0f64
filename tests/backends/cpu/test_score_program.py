"""Tests of score programs: which nodes share an instruction, and that this does not change a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.backends.cpu.score_program import PAIRS, Section
from anyattn.backends.cpu.score_simplify import simplify
from anyattn.definition.score.trace import trace

VALUES = anyattn.captured(np.linspace(-1, 1, 40))
# A function, and the instructions for every pair, without copies and without the last one, which writes the score.
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "slope": (lambda s, b, h, q, k: s + (q - k) * 0.5, ["sum_mul_f"]),
    "slope_of_two": (lambda s, b, h, q, k: s + 0.25 * (q + 2 * k - 3), ["sum_mul_f"]),
    "sum": (lambda s, b, h, q, k: s + (q - k).float(), ["sum_mul_f"]),
    "sum_in_a_product": (lambda s, b, h, q, k: s - VALUES[q] * (q - k), ["sum_mul_f"]),
    "used_twice": (
        lambda s, b, h, q, k: (q - k) * 0.5 * s + np.tanh(abs((q - k) * 0.5)),
        ["sum_mul_f", "abs_f", "tanh_f"],
    ),
    "sum_used_twice": (
        lambda s, b, h, q, k: s * np.where(q - k > 3, 1.0, (q - k) * 0.5),
        ["add_i", "lt_i", "i_to_f", "mul_f", "where"],
    ),
    "conversion_used_twice": (
        lambda s, b, h, q, k: s * np.tanh((q - k).float()) * (0.5 * (q - k).float()),
        ["sum_mul_f", "tanh_f", "mul_f", "mul_f"],
    ),
    "of_queries": (lambda s, b, h, q, k: s + (q + 3) * 0.5, []),
    "product_of_score": (lambda s, b, h, q, k: s * 0.5 - (q - k) * 0.25, ["sum_mul_f"]),
    "condition": (lambda s, b, h, q, k: s + (q > k) * 0.5, ["lt_i", "b_to_f"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nodes_share_an_instruction(name: str) -> None:
    function, expected = FUNCTIONS[name]
    graph = trace(function, None).graph
    simple, moved = simplify(graph, [graph.score or 0])
    section = Section(simple)
    section.add(moved.values())
    found = [one.operation for one in section._code[PAIRS] if not one.operation.startswith("spread")]
    assert found[:-1] == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shared_instructions_compute_the_same(name: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, 37, 2, 8)) for _ in range(4))
    found = []
    for backend in ("cpu", "numpy"):
        with anyattn.backend(backend):
            out, lse = anyattn.attention_forward(q, k, v, score_mod=FUNCTIONS[name][0])
            gradients = anyattn.attention_backward(dout, q, k, v, out, lse, score_mod=FUNCTIONS[name][0])
            found.append((out, lse, *gradients))
    for cpu, definition in zip(*found, strict=True):
        if cpu is not None and definition is not None:
            np.testing.assert_allclose(cpu, definition, rtol=1e-11, atol=1e-11)
