"""Tests that functions which say what a built-in argument says are computed as that argument, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import anyattn
from anyattn.definition.score.graph import SCORE
from anyattn.definition.score.patterns import Recognized, recognize
from anyattn.frameworks.torch.score_functions import traced
from harness.backends import Engine
from harness.selection import every_backend

HEADS = 2
SLOPES = torch.tensor([0.5, 0.25])
Function = Callable[..., Any]


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def alibi(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return score - SLOPES[h] * torch.abs(q - kv)


MASKS: dict[str, tuple[Function, dict[str, int]]] = {
    "causal": (causal, {"right": 0}),
    "reversed": (lambda b, h, q, kv: kv < q + 1, {"right": 0}),
    "window": (lambda b, h, q, kv: (q >= kv) & (q - kv <= 7), {"left": 7, "right": 0}),
    "lookahead": (lambda b, h, q, kv: (kv - q < 4) & (kv + 9 >= q), {"left": 9, "right": 3}),
    "symmetric": (lambda b, h, q, kv: (torch.abs(kv - q) <= 5) & (q - kv <= 3), {"left": 3, "right": 5}),
    "chunk": (lambda b, h, q, kv: (q // 16 == kv // 16) & causal(b, h, q, kv), {"right": 0, "chunk": 16}),
}
OTHERS: dict[str, Function] = {
    "strict": lambda b, h, q, kv: q > kv,  # no interval of an argument begins after the query
    "prefix": lambda b, h, q, kv: (q >= kv) | (kv < 3),
    "scaled": lambda b, h, q, kv: 2 * q >= kv,
    "chunks of two sizes": lambda b, h, q, kv: q // 16 == kv // 8,
    "one index": lambda b, h, q, kv: q // 16 == q // 16 + 0 * kv,
}


def found(score_mod: Function | None, mask_mod: Function | None) -> Recognized:
    return recognize(traced(score_mod, mask_mod).graph, HEADS)


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_positions_are_intervals(name: str) -> None:
    mask, bounds = MASKS[name]
    recognized = found(None, mask)
    assert recognized.graph.nodes == ()
    sides = {"left": recognized.left, "right": recognized.right, "chunk": recognized.chunk or None}
    assert {side: bound for side, bound in sides.items() if bound is not None} == bounds


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay_functions(name: str) -> None:
    graph = traced(None, OTHERS[name]).graph
    assert recognize(graph, HEADS) == Recognized(graph)


def test_the_rest_of_a_conjunction_stays_a_function() -> None:
    recognized = found(None, lambda b, h, q, kv: (q >= kv) & ((q % 3 == kv % 3) & (q // 8 == kv // 8)))
    assert (recognized.right, recognized.chunk) == (0, 8)
    assert recognized.graph == traced(None, lambda b, h, q, kv: q % 3 == kv % 3).graph


def test_a_call_has_one_chunk() -> None:
    recognized = found(None, lambda b, h, q, kv: (q // 8 == kv // 8) & (q // 12 == kv // 12))
    assert recognized.chunk == 8
    assert recognized.graph.mask is not None


def test_alibi_is_recognized_unless_its_slopes_have_a_gradient() -> None:
    assert found(alibi, None).slopes == 0
    learned = SLOPES.clone().requires_grad_()
    assert found(lambda s, b, h, q, kv: s - learned[h] * torch.abs(q - kv), None).slopes is None
    others: list[Function] = [
        lambda s, b, h, q, kv: s + SLOPES[h] * torch.abs(q - kv),
        lambda s, b, h, q, kv: s - SLOPES[h] * (q - kv),
        lambda s, b, h, q, kv: s - SLOPES[b] * torch.abs(q - kv),
        lambda s, b, h, q, kv: 2 * s - SLOPES[h] * torch.abs(q - kv),
    ]
    for other in others:
        recognized = found(other, None)
        assert recognized.slopes is None
        assert any(node.operation == SCORE for node in recognized.graph.nodes)


def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, HEADS, 16), (51, HEADS, 16), (51, HEADS, 16))
    return tuple(torch.randn(2, *shape, generator=generator).requires_grad_() for shape in shapes)


@every_backend(interpreter=True)
@pytest.mark.parametrize("name", [*MASKS, "alibi"])
def test_recognized_functions_have_the_bits_of_the_argument(name: str, engine: Engine) -> None:
    given: dict[str, Any] = {"alignment": "top-left"}
    functions: dict[str, Any] = {"mask_mod": causal, "score_mod": alibi}
    if name == "alibi":
        given |= {"causal": True, "alibi_slopes": SLOPES}
    else:
        mask, bounds = MASKS[name]
        functions = {"mask_mod": mask}
        given |= {"window": (bounds.get("left"), bounds.get("right")), "chunk": bounds.get("chunk", 0)}
    results = []
    for arguments in (functions, given):
        inputs = tensors()
        out = anyattn.attention(*inputs, **arguments, backend=engine.backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_a_call_with_an_interval_keeps_its_functions() -> None:
    q, k, v = tensors()
    one = anyattn.attention(q, k, v, mask_mod=causal, window=(5, None), alignment="bottom-right")
    distance = torch.arange(40)[:, None] - torch.arange(51)[None, :]
    expected = anyattn.attention(q, k, v, mask=(distance >= 0) & (distance + 11 <= 5))
    torch.testing.assert_close(one, expected)
