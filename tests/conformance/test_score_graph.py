"""Tests of the graph of score functions: errors of tracing, derivatives, and intervals against every pair."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.definition.score import derivative, intervals, operations
from anyattn.definition.score.evaluate import Functions, Place
from anyattn.definition.score.graph import BOOL, FLOAT, INT, parse
from anyattn.definition.score.interval_rules import RULES, Interval
from anyattn.definition.score.intervals import Extremes, Range
from anyattn.definition.score.patterns import recognize
from anyattn.definition.score.trace import Traced, trace

N, TILE = 256, 32
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal(N).astype(np.float32)
WITH_NAN = np.where(np.arange(N) == 7, np.nan, VALUES).astype(np.float32)
DOCUMENTS = np.sort(RNG.integers(0, 5, N)).astype(np.int32)
ORDER = RNG.permutation(N).astype(np.int32)
x, nan, doc, order = (anyattn.captured(array) for array in (VALUES, WITH_NAN, DOCUMENTS, ORDER))
tenth, precise = (anyattn.captured(np.full(N, 0.1, dtype)) for dtype in (np.float32, np.float64))  # float32 is larger

TABLE = anyattn.captured(np.ones((2, 3)))

Mask = Callable[..., Any]
MASKS: dict[str, Mask] = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q - k <= 37) & (k - q < 5),
    "prefix": lambda b, h, q, k: (q >= k) | (k < 70),
    "documents": lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k),
    "dilated": lambda b, h, q, k: ((q - k) % 4 == 0) & (q >= k),
    "global": lambda b, h, q, k: (abs(q - k) <= 20) | (q < 16) | (k < 16),
    "blocks": lambda b, h, q, k: q // 64 >= k // 64,
    "per_head": lambda b, h, q, k: (q >= k) | (h == 1),
    "bits": lambda b, h, q, k: ((q & ~63) == (k & ~63)) | ((q ^ k) < 40) | ((q >> 5) + (k << 2) == 3),
    "double_read": lambda b, h, q, k: order[order[q]] > k,
    "unequal": lambda b, h, q, k: (doc[q] != doc[k]) ^ (k > 40),
    "rounded_constant": lambda b, h, q, k: (tenth[k] > 0.1) | (q > 300),
    "products": lambda b, h, q, k: x[q] * x[k] > 0.1,
    "quotients": lambda b, h, q, k: (q - 5) // (k - 9) > 2,
    "remainders": lambda b, h, q, k: (q - 50) % (k - 20) > 2,
    "float_quotients": lambda b, h, q, k: x[q] / x[k] < 1,
    "float_floors": lambda b, h, q, k: x[q] // x[k] < 1,
    "float_remainders": lambda b, h, q, k: x[q] % x[k] < 0.1,
    "roots": lambda b, h, q, k: np.sqrt(x[q]) < 9,
    "logarithms": lambda b, h, q, k: ~(np.log(x[q]) < 9),
    "powers": lambda b, h, q, k: np.float_power(x[q], x[k]) > 0.5,
    "exponentials": lambda b, h, q, k: (q - k) / 7 <= np.exp(x[k]),
    "minimum_of_nan": lambda b, h, q, k: np.minimum(nan[k], 3) < 4.5,
    "not_of_nan": lambda b, h, q, k: ~(nan[k] < 100),
    "tanh_of_nan": lambda b, h, q, k: np.tanh(nan[k]) < 2,
    "choice": lambda b, h, q, k: np.where(q > k, q * k, -k * k) > 99,
    "branches": lambda b, h, q, k: np.where(q - k < 9, (q - k) * 3, 40 - (q - k)) > 5,
    "branches_of_both": lambda b, h, q, k: np.where(q <= k, k - 2 * q, 3 * q - k) < 60,
    "nested_branches": lambda b, h, q, k: np.where(q < 100, np.where(k < q, q - k, 300), np.where(k > 200, -k, q)) > 50,
    "buckets": lambda b, h, q, k: (
        np.where(abs(q - k) < 8, abs(q - k), np.minimum(8 + (np.log(abs(q - k) / 8) * 3).int(), 15)) > 10
    ),
    "casts": lambda b, h, q, k: (x[q] * 100).int() > k - 200,
    "waves": lambda b, h, q, k: np.sin(x[q] * k) < 2,
    "signs": lambda b, h, q, k: np.sign(x[q]) + np.floor(x[k]) + np.round(x[k]) < 0,
}


def functions(traced: Traced) -> Functions:
    flat = {True: [np.zeros(0, np.float32)], False: [np.zeros(0, np.int32)]}
    for array in traced.arrays:
        flat[array.dtype.kind == "f"].append(array.reshape(-1))
    return Functions(traced.graph, np.concatenate(flat[True]), np.concatenate(flat[False]), "float32")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("h", [0, 1])
def test_a_tile_is_full_or_empty_only_if_every_pair_is(name: str, h: int) -> None:
    traced = trace(None, MASKS[name])
    call = functions(traced)
    mask = np.broadcast_to(call.mask(Place(0, h, np.arange(N)[:, None], np.arange(N))), (N, N))
    tiles = mask.reshape(N // TILE, TILE, N // TILE, TILE).swapaxes(1, 2)
    low, high = classify(traced, call, h)
    assert not (low & ~tiles.all(axis=(2, 3))).any()
    assert not (~high & tiles.any(axis=(2, 3))).any()


@pytest.mark.parametrize("name", ["causal", "window", "prefix", "dilated", "global", "blocks", "per_head"])
def test_masks_of_positions_are_classified_exactly(name: str) -> None:
    traced = trace(None, MASKS[name])
    call = functions(traced)
    mask = np.broadcast_to(call.mask(Place(0, 0, np.arange(N)[:, None], np.arange(N))), (N, N))
    tiles = mask.reshape(N // TILE, TILE, N // TILE, TILE).swapaxes(1, 2)
    low, high = classify(traced, call, 0)
    np.testing.assert_array_equal(high, tiles.any(axis=(2, 3)))
    if name != "global":  # two conditions together fill a tile that neither fills alone
        np.testing.assert_array_equal(low, tiles.all(axis=(2, 3)))


def test_blocks_hold_for_either_precision_of_a_call() -> None:
    found = anyattn.block_mask(lambda b, h, q, k: tenth[k] > precise[q], 1, 1, N, N)
    assert (found.kinds == 1).all()  # float32(0.1) is larger than 0.1, and equal after rounding


def classify(traced: Traced, call: Functions, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each tile: True everywhere, True somewhere."""
    start = np.arange(0, N, TILE, dtype=np.float64)
    q, k = (Interval(x, x + TILE - 1) for x in (start[:, None], start))
    zero, head = np.float64(0), np.float64(h)
    ranges = Range(Interval(zero, zero), Interval(head, head), q, k)
    result = traced.graph.mask
    assert result is not None
    found = intervals.bounds(traced.graph, (result,), ranges, [Extremes(array) for array in call.arrays])[result]
    shape = (N // TILE, N // TILE)
    return np.broadcast_to(np.asarray(found.low, bool), shape), np.broadcast_to(np.asarray(found.high, bool), shape)


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": lambda q, k: q < k,
    "le": lambda q, k: q <= k,
    "gt": lambda q, k: q > k,
    "ge": lambda q, k: q >= k,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("last", [10, 14])
def test_a_condition_bounds_the_values_of_a_branch(name: str, last: int) -> None:
    compare = COMPARISONS[name]
    q, k = np.arange(5, 13)[:, None], np.arange(10, last + 1)
    branches: list[Callable[..., Any]] = [
        lambda b, h, i, j: np.where(compare(i, j), i, 7) > 0,
        lambda b, h, i, j: np.where(compare(i, j), 11, i) > 0,
        lambda b, h, i, j: np.where(compare(i, j), j, 12) > 0,
        lambda b, h, i, j: np.where(compare(i, j), 12, 2 * j) > 0,
    ]
    values = [np.where(compare(q, k), *pair) for pair in ((q, 7), (11, q), (k, 12), (12, 2 * k))]
    zero = Interval(np.float64(0), np.float64(0))
    ranges = Range(zero, zero, Interval(np.float64(5), np.float64(12)), Interval(np.float64(10), np.float64(last)))
    for function, exact in zip(branches, values, strict=True):
        graph = trace(None, function).graph
        [chosen] = [number for number, node in enumerate(graph.nodes) if node.operation == "where"]
        found = intervals.bounds(graph, (chosen,), ranges, [])[chosen]
        assert found == Interval(exact.min(), exact.max())


def test_every_operation_has_an_interval_and_a_derivative() -> None:
    assert set(RULES) == set(operations.OPERATIONS)
    differentiable = {
        name for name, row in operations.OPERATIONS.items() if FLOAT in row.accepts and row.result != BOOL
    }
    assert set(derivative.RULES) == differentiable - {"to_int"} | {"to_float"}


SMOOTH: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "log": lambda s: np.log(s * s + 1),
    "sqrt": lambda s: np.sqrt(s * s + 1),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "division": lambda s: 2 / (s * s + 1) - s / 3,
    "reflected": lambda s: 1 - 2 * s,
    "power": lambda s: np.float_power(s * s + 1, s),
    "cube": lambda s: s**3,
    "absolute": abs,
    "remainder": lambda s: np.remainder(s, 10.0) + np.remainder(30.0, s * s + 40),
    "choice": lambda s: np.where(s > 0, s * s, -s),
    "bounds": lambda s: np.minimum(np.maximum(s, 2 * s), 1.5),
    "clip": lambda s: np.clip(s, -1, 1),
    "steps": lambda s: np.floor(s) + np.round(s) + np.sign(s) + s,
    "exp2": np.exp2,
    "square": np.square,
}


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_are_those_of_differences(name: str) -> None:
    graph = trace(lambda s, b, h, q, k: SMOOTH[name](s), None).graph
    call = Functions(graph, None, None, "float64")
    s = np.array([[-1.7, -0.9, -0.3, 0.2, 0.8, 1.3, 2.1]])
    place = Place(0, 0, np.zeros((1, 1), int), np.arange(s.size))
    np.testing.assert_allclose(call.score(s, place), SMOOTH[name](s), rtol=1e-15)
    slope = call.backward(s, place, np.ones_like(s), None)
    step = 1e-6
    difference = (SMOOTH[name](s + step) - SMOOTH[name](s - step)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-8, atol=1e-8)


def test_text_is_parsed_to_the_same_graph_and_does_not_depend_on_values() -> None:
    def traced(factor: float) -> Traced:
        biases = anyattn.captured(np.full((4, 9), factor, np.float32))
        return trace(lambda s, b, h, q, k: np.where(q >= k, s + biases[h, q - k], -np.inf), MASKS["window"])

    first, second = traced(1.0).graph, traced(2.0).graph
    assert first == second == parse(first.text)
    assert first.text == second.text
    assert [node.kind for node in first.nodes if node.operation == "read"] == [FLOAT]
    with pytest.raises(ValueError, match="must be the text of a traced graph"):
        parse("[]")


def test_equal_graphs_compute_the_same() -> None:
    """Graphs are keys of caches, and 0.0 equals -0.0."""
    for zero in (0.0, -0.0):
        graph = recognize(trace(lambda s, b, h, q, k, x=zero: np.where(q > k, x, s), None).graph, 1).graph
        found = Functions(graph, None, None, "float32").score(np.ones((), np.float32), Place(0, 0, 1, 0))
        assert np.signbit(found) == np.signbit(zero)


def test_equal_terms_are_computed_once() -> None:
    graph = trace(lambda s, b, h, q, k: np.exp(s) * np.exp(s) + np.exp(s), None).graph
    assert [node.operation for node in graph.nodes] == ["score", "exp", "mul", "add"]


REFUSED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "branch": (lambda s, b, h, q, k: s if q > k else 0, TypeError, "must not branch on a traced value"),
    "and": (lambda s, b, h, q, k: q > k and s, TypeError, "must not branch on a traced value"),
    "builtin_max": (lambda s, b, h, q, k: max(q, k), TypeError, "minimum and maximum"),
    "numpy_index": (lambda s, b, h, q, k: VALUES[q], TypeError, "anyattn.captured(array)[...]"),
    "float": (lambda s, b, h, q, k: float(s), TypeError, "cannot become a Python number"),
    "unknown_function": (lambda s, b, h, q, k: np.cumsum(s), NotImplementedError, "cumsum is not supported"),
    "reduction": (lambda s, b, h, q, k: np.add.reduce(s), NotImplementedError, "numpy.add.reduce"),
    "attribute": (lambda s, b, h, q, k: s.item(), AttributeError, "no attribute 'item'"),
    "array": (lambda s, b, h, q, k: np.ones(4), TypeError, "an array of shape (4,)"),
    "tuple": (lambda s, b, h, q, k: (s, s), TypeError, "got tuple"),
    "nothing": (lambda s, b, h, q, k: None, TypeError, "got NoneType"),
    "boolean": (lambda s, b, h, q, k: s > 0, TypeError, "got a boolean"),
    "too_few_indices": (
        lambda s, b, h, q, k: TABLE[h] + s,
        TypeError,
        "with one index per axis",
    ),
    "too_many_indices": (lambda s, b, h, q, k: x[q, k], IndexError, "has 1 axes, got 2 indices"),
    "float_index": (lambda s, b, h, q, k: x[s], TypeError, "must be an integer, got floating-point values"),
    "slice": (lambda s, b, h, q, k: x[:], NotImplementedError, "single elements"),
    "constant_index": (lambda s, b, h, q, k: x[N], IndexError, "from 0 to 255, got 256"),
    "write": (lambda s, b, h, q, k: s.__setitem__(0, 1), NotImplementedError, "must not write"),
    "bits_of_floats": (lambda s, b, h, q, k: s | 1, TypeError, "takes integers or booleans, got floating-point values"),
    "text": (lambda s, b, h, q, k: np.where(q > k, s, "x"), TypeError, "got str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_function_that_cannot_be_traced_raises_with_its_line_and_the_remedy(name: str) -> None:
    function, error, message = REFUSED[name]
    with pytest.raises(error, match=re.escape(message)) as raised:
        trace(function, None)
    if name not in ("array", "tuple", "nothing", "boolean"):
        assert f"{__file__}:{function.__code__.co_firstlineno}" in str(raised.value)


def test_a_mask_must_be_a_boolean_and_functions_must_be_callable() -> None:
    with pytest.raises(TypeError, match="mask_mod must return a boolean for each pair, got an integer"):
        trace(None, lambda b, h, q, k: q - k)
    with pytest.raises(TypeError, match="score_mod must be a function or None, got int"):
        trace(3, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=re.escape("got one of (score, b, h): too many positional arguments.")):
        trace(lambda score, b, h: score, None)
    with pytest.raises(
        TypeError, match=re.escape("mask_mod must be a function of (b, h, q_idx, kv_idx), got one of (*")
    ):
        trace(None, lambda *indices, scale: indices[2] >= scale)
    assert trace(lambda *given: given[0], None).graph.score == 0
    with pytest.raises(RuntimeError, match="must be read inside a score function"):
        x[3]


def test_kinds_are_promoted_as_in_torch() -> None:
    graph = trace(lambda s, b, h, q, k: (q // 2 + k / 2) * (q > k), None).graph
    kinds = {node.operation: node.kind for node in graph.nodes}
    assert (kinds["floordiv"], kinds["div"], kinds["mul"]) == (INT, FLOAT, FLOAT)
