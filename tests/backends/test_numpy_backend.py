"""Tests of the NumPy backend alone: its memory, its tiles, and its refusal of device memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from anyattn import testing
from anyattn.backends.numpy import tiles
from anyattn.definition import inputs as arrays
from anyattn.definition.options import Options
from anyattn.frameworks import numpy
from anyattn.runtime import dispatch
from anyattn.testing import Case, make_inputs
from harness.cases import NAMED, named, small

MB = 2**20
MANY_TILES = [case for case in small(NAMED, 60_000) if case.seqlen_q > 7 and case.seqlen_k > 7]


@pytest.mark.parametrize("size", [(16, 24, 600), (5, 7, 1), (64, 3, 5000)], ids=str)
@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_results_do_not_depend_on_the_tile_size(
    case: Case, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most cases fit in one tile of the size that serves the machine best."""
    for name, value in zip(("TILE_Q", "TILE_K", "TILE_ENTRIES"), size, strict=True):
        monkeypatch.setattr(tiles, name, value)
    inputs = make_inputs(case)
    got = testing.compute(inputs, "forward", "numpy") | testing.compute(inputs, "backward", "numpy")
    expected = testing.expected(inputs) | testing.expected(inputs, "backward")
    assert testing.compare(expected, got) == []


def peak(call: Callable[[], object]) -> int:
    """Bytes that the call held at most, results included."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def both_passes(case: Case) -> Callable[[], object]:
    return partial(testing.compute, make_inputs(case), "backward", "numpy")


def case_of(seqlen: int, **options: object) -> Case:
    sizes = {"batch": 1, "seqlen_q": seqlen, "seqlen_k": seqlen, "nheads_kv": 1, "head_dim": 8, "head_dim_v": 8}
    return replace(named("plain"), causal=True, **{**sizes, **options})  # type: ignore[arg-type]


OPTIONS: list[dict[str, object]] = [
    {},
    {"group": 4, "softcap": 3.0, "sink": True, "alibi": "h", "dtype": "bfloat16"},
    {"dropout_p": 0.1, "bias": "row", "mask": "row", "dtype": "float16"},
    {"lengths": "paged", "page_size": 16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_is_linear(options: dict[str, object]) -> None:
    """The scores alone would take 4 and 16 MB per head in float32."""
    peaks = [peak(both_passes(case_of(seqlen, **options))) for seqlen in (1024, 2048)]
    assert max(peaks) < 8 * MB
    assert peaks[1] < 1.3 * peaks[0] + MB


def test_bias_gradient_is_stored_once() -> None:
    """A float16 dbias without broadcast axes is written tile by tile."""
    case = case_of(1500, bias="full", dtype="float16")
    assert peak(both_passes(case)) < make_inputs(case).arguments["bias"].nbytes + 4 * MB


def test_nan_in_keys_between_the_intervals_of_queries_changes_nothing() -> None:
    """Negative bounds with chunks leave masked keys in the middle of a tile. NaN in them changes nothing."""
    options = Options(left=-3, right=5, chunk=8, alignment="top-left")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, 2, 8), np.float32) for _ in range(3))
    hidden = np.arange(40) % 8 < 3
    results = []
    for stale in (0.0, np.nan):
        k[:, hidden], v[:, hidden] = stale, stale
        given = arrays.Inputs(q, k, v)
        out, lse = numpy.forward(given, options, None, "numpy")
        gradients = numpy.backward(arrays.Saved(out, lse, q), given, options, None, "numpy")
        results.append([out, lse, gradients.dq, gradients.dk, gradients.dv])
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(clean, dirty)


def test_device_memory_is_refused() -> None:
    problem, _ = make_inputs(named("plain")).describe()
    elsewhere = problem.with_arrays(q=problem.q._replace(device="cuda:0"))
    assert dispatch.get("numpy").supports(problem) == []
    assert "cuda:0" in dispatch.get("numpy").supports(elsewhere)[0]
