"""Tests that functions which say what a built-in argument says are computed as that argument, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn.definition.score.documents import boundaries
from anyattn.definition.score.graph import SCORE
from anyattn.definition.score.patterns import Lengths, Recognized, recognize
from anyattn.definition.score.score_patterns import Operand, Scored
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
    "lengths of queries": lambda b, h, q, kv: q < LENGTHS[b],
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


def test_long_and_shared_terms_are_visited_once() -> None:
    def doubled(b: Any, h: Any, i: Any, j: Any) -> Any:
        distance, mask = i - j, i >= j
        for _ in range(60):
            distance, mask = distance + distance, mask & mask
        return mask & (distance - distance >= j - i)

    def long(b: Any, h: Any, i: Any, j: Any) -> Any:
        mask, moved = i >= j, i
        for step in range(1500):
            mask, moved = mask & (j != step), moved + 1
        return mask & (moved - j <= 1503)

    assert recognize(traced(None, doubled).graph, 1).right == 0
    found = recognize(traced(None, long).graph, 1)
    assert (found.left, found.right) == (3, 0)


def test_a_call_has_one_chunk() -> None:
    recognized = found(None, lambda b, h, q, kv: (q // 8 == kv // 8) & (q // 12 == kv // 12))
    assert recognized.chunk == 8
    assert recognized.graph.mask is not None


def test_alibi_is_recognized_unless_its_slopes_have_a_gradient() -> None:
    assert found(alibi, None).score.slopes == 0
    learned = SLOPES.clone().requires_grad_()
    assert found(lambda s, b, h, q, kv: s - learned[h] * torch.abs(q - kv), None).score.slopes is None
    others: list[Function] = [
        lambda s, b, h, q, kv: s + SLOPES[h] * torch.abs(q - kv),
        lambda s, b, h, q, kv: s - SLOPES[h] * (q - kv),
        lambda s, b, h, q, kv: s - SLOPES[b] * torch.abs(q - kv),
        lambda s, b, h, q, kv: s - torch.log(h.float()) * torch.abs(q - kv),  # infinite for head 0
        lambda s, b, h, q, kv: s - torch.exp2(-SLOPES[h]) * torch.abs(q - kv),
        lambda s, b, h, q, kv: SLOPES[h] * torch.abs(q - kv) - s,
    ]
    for other in others:
        recognized = found(other, None)
        assert recognized.score.slopes is None
        assert any(node.operation == SCORE for node in recognized.graph.nodes)


SIGNED: dict[str, Function] = {
    "key minus query": lambda s, b, h, q, kv: s + (kv - q) * SLOPES[h],
    "query minus key": lambda s, b, h, q, kv: s - SLOPES[h] * (q - kv),
    "negative slope": lambda s, b, h, q, kv: (q - kv) * -SLOPES[h] + s,
    "negative distance": lambda s, b, h, q, kv: s + SLOPES[h] * -(q - kv).abs(),
    "attention-gym": lambda s, b, h, q, kv: s + (kv - q) * torch.exp2(-((h + 1) * 8.0 / HEADS)),
}


def is_close(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q - kv <= 3) & (kv - q <= 1)


@pytest.mark.parametrize("name", SIGNED)
def test_signed_alibi_is_recognized_if_no_key_comes_after_its_query(name: str) -> None:
    score = SIGNED[name]
    recognized = found(score, causal)
    slopes = recognized.score.slopes
    assert slopes == 0 or slopes == pytest.approx((0.0625, 0.00390625), rel=1e-15)
    assert recognized.graph.nodes == ()
    for mask in (None, is_close, lambda b, h, q, kv: (q >= kv) | (kv < 3)):
        alone = found(score, mask).score.slopes
        assert (alone is None) == (name != "negative distance")
    reversed_sign = found(lambda s, *pair: 2 * s - score(s, *pair), causal)
    assert reversed_sign.score.slopes is None


@pytest.mark.parametrize(
    ("arguments", "is_recognized"),
    [
        ({"mask_mod": causal}, True),
        ({"causal": True}, True),
        ({"window": (7, 0)}, True),
        ({"causal": True, "n_k": 51, "alignment": "top-left"}, True),
        ({"causal": True, "n_k": 51}, False),  # positions of queries begin at 11
        ({"causal": True, "seqused_k": torch.tensor([40, 31])}, False),
        ({"causal": True, "offset": 2}, False),
        ({"window": (None, 3)}, False),
        ({}, False),
    ],
)
def test_signed_alibi_in_a_call(
    arguments: dict[str, Any], is_recognized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_k = arguments.get("n_k", 40)
    given = {name: x for name, x in arguments.items() if name != "n_k"}
    q, k, v = (x.detach()[:, :n] for x, n in zip(tensors(), (40, n_k, n_k), strict=True))
    calls = recorded_calls(monkeypatch)
    got = anyattn.attention(q, k, v, **given, score_mod=SIGNED["attention-gym"])
    assert (calls[0].alibi_slopes is not None) == is_recognized
    bias = torch.tensor([0.0625, 0.00390625])[:, None, None] * (torch.arange(n_k) - torch.arange(40)[:, None])
    torch.testing.assert_close(got, anyattn.attention(q, k, v, **given, bias=bias))


FULL_BIAS, HEAD_BIAS = torch.zeros(2, 2, 40, 51), torch.zeros(2, 51)
KEYS, LENGTHS = torch.ones(2, 51) > 0, torch.ones(2)
SCORES: dict[str, tuple[Function, Scored]] = {
    "unchanged": (lambda s, b, h, q, kv: s, Scored()),
    "scale": (lambda s, b, h, q, kv: 3 * s / 2, Scored(scale=1.5)),
    "softcap": (lambda s, b, h, q, kv: 20.0 * torch.tanh(s / 20.0), Scored(softcap=20.0)),
    "scale and softcap": (lambda s, b, h, q, kv: torch.tanh(s * 0.5) * 2, Scored(1.0, 2.0)),
    "bias": (lambda s, b, h, q, kv: s + FULL_BIAS[b, h, q, kv], Scored(bias=Operand(0, (0, 1, 2, 3)))),
    "bias of heads": (lambda s, b, h, q, kv: HEAD_BIAS[h, kv] + 2 * s, Scored(2.0, bias=Operand(0, (1, 3)))),
    "every part": (
        lambda s, b, h, q, kv: 5 * torch.tanh(s / 5) + HEAD_BIAS[h, kv] - SLOPES[h] * torch.abs(q - kv),
        Scored(1.0, 5.0, Operand(0, (1, 3)), 1),
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_scale_softcap_bias_and_alibi_are_arguments(name: str) -> None:
    function, arguments = SCORES[name]
    recognized = found(function, None)
    assert recognized.score == arguments
    assert recognized.graph.nodes == ()


def test_other_scores_stay_functions() -> None:
    others: list[Function] = [
        lambda s, b, h, q, kv: -2 * s,
        lambda s, b, h, q, kv: torch.tanh(s + 1),
        lambda s, b, h, q, kv: s + FULL_BIAS[h, b, q, kv],
        lambda s, b, h, q, kv: s * s,
    ]
    for function in others:
        assert found(function, None) == Recognized(traced(function, None).graph)


def test_lengths_and_captured_masks_are_arguments() -> None:
    lengths = torch.tensor([3, 40])
    recognized = found(None, lambda b, h, q, kv: (kv < lengths[b]) & KEYS[b, kv] & (kv <= lengths[b] - 2) & (q >= kv))
    assert (recognized.lengths, recognized.mask, recognized.right) == (Lengths(0, 0), Operand(1, (0, 3)), 0)
    assert recognized.graph.nodes == traced(None, lambda b, h, q, kv: kv <= lengths[b] - 2).graph.nodes  # one table


def test_documents_are_found_by_their_places() -> None:
    assert boundaries(np.array([0, 0, 1, 1, 1, 7]), 1).tolist() == [0, 2, 5, 6]
    assert boundaries(np.array([5, 5, 2]), 2).tolist() == [0, 2, 3, 5, 6]
    assert boundaries(np.array([[0, 0, 1], [3, 1, 2]]), 2).tolist() == [0, 2, 3, 4, 5, 6]
    assert boundaries(np.array([[0, 0, 1], [3, 1, 3]]), 2) is None


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


def results(arguments: dict[str, Any], inputs: tuple[torch.Tensor, ...], *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Return out, lse and the gradients of a call."""
    out, lse = anyattn.attention(*inputs, **arguments, return_lse=True)
    loss = out.square().sum() + lse[lse > -torch.inf].sum()
    return [out, lse, *torch.autograd.grad(loss, (*inputs, *leaves))]


LIMITS = torch.tensor([51, 17])
BIAS = torch.randn(HEADS, 60, generator=torch.Generator().manual_seed(1)).requires_grad_()
ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scale": ({"score_mod": lambda s, b, h, q, kv: s * 3}, {"scale": 16**-0.5 * 3}),
    "softcap": ({"score_mod": lambda s, b, h, q, kv: 2 * torch.tanh(s / 2)}, {"softcap": 2.0}),
    "bias": (
        {"score_mod": lambda s, b, h, q, kv: s + BIAS[h, kv], "mask_mod": causal},
        {"bias": BIAS[None, :, None, :51], "causal": True, "alignment": "top-left"},
    ),
    "lengths": (
        {"mask_mod": lambda b, h, q, kv: (kv <= LIMITS[b] - 2) & causal(b, h, q, kv)},
        {"seqused_k": LIMITS - 1, "causal": True, "alignment": "top-left"},
    ),
    "mask": ({"mask_mod": lambda b, h, q, kv: PADDING[b, kv]}, {"mask": torch.arange(51)[None, None, None] < 30}),
}
PADDING = (torch.arange(60) < 30).expand(3, 60)


@every_backend(interpreter=True)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_recognized_arguments_have_the_bits_of_the_argument(name: str, engine: Engine) -> None:
    functions, given = ARGUMENTS[name]
    leaves = (BIAS,) if name == "bias" else ()
    inputs = tensors()
    both = [results({**one, "backend": engine.backend}, inputs, *leaves) for one in (functions, given)]
    for got, want in zip(*both, strict=True):
        assert torch.equal(got, want)


DOCUMENTS = torch.tensor([0] * 9 + [4] * 17 + [2] * 14), torch.tensor([1] * 40)
BATCH_DOCUMENTS = torch.stack([DOCUMENTS[0], torch.arange(40) // 13])
STARTS = torch.tensor([0, 0, 26, 0, 9])  # of each document in DOCUMENTS[0]
TABLE = torch.randn(HEADS, 80, generator=torch.Generator().manual_seed(2)).requires_grad_()


def in_document(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return DOCUMENTS[0][q] == DOCUMENTS[0][kv]


MASKS_OF_DOCUMENTS: dict[str, dict[str, Any]] = {
    "documents": {"mask_mod": in_document},
    "one document": {"mask_mod": lambda b, h, q, kv: DOCUMENTS[1][kv] == DOCUMENTS[1][q]},
    "of each entry": {"mask_mod": lambda b, h, q, kv: (q >= kv) & (BATCH_DOCUMENTS[b, q] == BATCH_DOCUMENTS[b, kv])},
    "window": {"mask_mod": lambda b, h, q, kv: in_document(b, h, q, kv) & (q >= kv) & (q - kv < 6)},
    "dilated": {"mask_mod": lambda b, h, q, kv: in_document(b, h, q, kv) & ((q - kv) % 3 == 0)},
    "relative": {
        "mask_mod": lambda b, h, q, kv: in_document(b, h, q, kv) & (q >= kv),
        "score_mod": lambda s, b, h, q, kv: torch.tanh(s) + TABLE[h, q - kv + 40],
    },
    "by position in a document": {
        "mask_mod": lambda b, h, q, kv: (
            in_document(b, h, q, kv) & (q - STARTS[DOCUMENTS[0][q]] >= kv - STARTS[DOCUMENTS[0][kv]])
        ),
    },
}


def square_tensors() -> tuple[torch.Tensor, ...]:
    return tuple(x[:, :40].detach().requires_grad_() for x in tensors())


def recorded_calls(monkeypatch: pytest.MonkeyPatch, field: str = "") -> list[Any]:
    """Return a list that takes the optional arrays of every call, or one of them."""
    from anyattn.frameworks.torch import functional

    found: list[Any] = []
    attention = functional.attention

    def recorded(inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        found.append(getattr(inputs.extras, field) if field else inputs.extras)
        return attention(inputs, *arguments, **keywords)

    monkeypatch.setattr(functional, "attention", recorded)
    return found


@every_backend(only=("cpu", "numpy"))
@pytest.mark.parametrize("name", MASKS_OF_DOCUMENTS)
def test_documents_are_packed_sequences(name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = MASKS_OF_DOCUMENTS[name]
    mask = functions["mask_mod"](*torch.meshgrid(*(torch.arange(n) for n in (2, HEADS, 40, 40)), indexing="ij"))
    leaves = (TABLE,) if name == "relative" else ()
    inputs, calls = square_tensors(), recorded_calls(monkeypatch, "cu_seqlens_q")
    got = results({**functions, "backend": engine.backend}, inputs, *leaves)
    assert calls[0][-1] == 2 * 40  # rows of both entries of the batch
    dense = {"mask": mask, "backend": "numpy"}
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    if leaves:
        dense["score_mod"] = functions["score_mod"]
    for one, want in zip(got, results(dense, doubles, *leaves), strict=True):
        assert one.shape == want.shape
        assert one.is_contiguous()
        torch.testing.assert_close(one, want.to(one.dtype), rtol=2e-5, atol=2e-5)


def test_documents_equal_packed_sequences_bit_by_bit() -> None:
    q, k, v = square_tensors()
    boundaries_of = torch.tensor([0, 9, 26, 40, 49, 66, 80])
    out = anyattn.attention(q, k, v, mask_mod=in_document)
    rows = [x.reshape(80, HEADS, 16) for x in (q, k, v)]
    assert torch.equal(out.reshape(80, HEADS, 16), anyattn.attention_varlen(*rows, boundaries_of, boundaries_of))


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout_p": 0.5, "seed": 1},
        {"bias": torch.zeros(40, 40)},
        {"seqused_k": torch.tensor([40, 3])},
        {"score_mod": lambda s, b, h, q, kv: s * b},
        {"score_mod": lambda s, b, h, q, kv: s + q},
        {"mask_mod": lambda b, h, q, kv: in_document(b, h, q, kv) & (q % 3 == kv % 3)},
        {"mask_mod": lambda b, h, q, kv: in_document(b, h, q, kv) | (q == kv)},
        {"mask_mod": lambda b, h, q, kv: torch.arange(40)[q] % 2 == torch.arange(40)[kv] % 2},
        {"mask_mod": lambda b, h, q, kv: SCATTERED[q] == SCATTERED[kv]},
    ],
)
def test_documents_that_depend_on_their_place_stay_functions(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded_calls(monkeypatch, "cu_seqlens_q")
    anyattn.attention(*square_tensors(), **{"mask_mod": in_document, **arguments})
    assert calls == [None]


SCATTERED = torch.tensor([0, 1] * 20)


def test_explicit_passes_recognize_documents_and_alibi() -> None:
    q, k, v = (x.detach() for x in square_tensors())
    functions: dict[str, Any] = {"mask_mod": MASKS_OF_DOCUMENTS["of each entry"]["mask_mod"], "score_mod": alibi}
    out, lse = anyattn.attention_forward(q, k, v, **functions)
    grads = anyattn.attention_backward(2 * out, q, k, v, out, lse, dlse=torch.ones_like(lse), **functions)
    want = results(functions, tuple(x.requires_grad_() for x in (q, k, v)))
    for got, one in zip((out, lse, *grads[:3]), want, strict=True):
        assert torch.equal(got, one)
    assert grads.dcaptured is not None
    assert grads.dcaptured.tolist() == [0, 0]  # slopes without requires_grad


@every_backend(only=("cpu", "numpy"))
def test_a_cache_recognizes_functions(engine: Engine) -> None:
    q, k, v = (x.detach() for x in tensors())
    functions: dict[str, Any] = {"mask_mod": causal, "score_mod": alibi}
    given: dict[str, Any] = {"causal": True, "alignment": "top-left", "alibi_slopes": SLOPES}
    shared = {"cache_seqlens": torch.tensor([30, 41]), "backend": engine.backend}
    one, other = (anyattn.attention_with_kvcache(q, k, v, **shared, **x) for x in (functions, given))
    assert torch.equal(one, other)
    both = (anyattn.attention_with_kvcache(q, k, v, backend=engine.backend, **x) for x in
            ({"mask_mod": lambda b, h, q, kv: kv < LIMITS[b]}, {"cache_seqlens": LIMITS}))  # fmt: skip
    torch.testing.assert_close(*both)
