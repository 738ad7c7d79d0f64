"""The soak itself: its problems are bounded and have every feature, and errors are reported with their seed."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest

import soak
from anyattn.testing.cases import BROADCASTS, CONTENTS, DTYPES, LAYOUTS, LENGTHS
from harness.backends import engines
from harness.memory import Memory

CASES = [soak.draw(seed) for seed in range(4000)]


def test_seed_determines_the_problem() -> None:
    assert [soak.draw(seed) for seed in range(50)] == CASES[:50]
    assert len(set(CASES)) == len(CASES)


def test_sizes_are_large_and_bounded() -> None:
    for case in CASES:
        heads = case.batch * case.nheads_kv * case.group
        assert max(case.seqlen_q, case.seqlen_k) <= soak.LIMITS.longest
        assert heads <= 1 or heads * case.seqlen_q * case.seqlen_k <= soak.LIMITS.scores
    assert max(case.seqlen_q * case.seqlen_k for case in CASES) > soak.LIMITS.longest**2 / 2
    for size in ("seqlen_q", "seqlen_k"):
        lengths = {getattr(case, size) for case in CASES}
        assert {0, 1, soak.LIMITS.longest} <= lengths and len(lengths) > 500


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("dtype", set(DTYPES)),
        ("lengths", set(LENGTHS)),
        ("layout", set(LAYOUTS)),
        ("content", set(CONTENTS)),
        ("bias", {"", *BROADCASTS}),
        ("mask", {"", *BROADCASTS}),
        ("offset", {"", "int", "each"}),
        ("alibi", {"", "h", "bh"}),
        ("group", {1, 2, 4, 8}),
        ("sink", {True, False}),
        ("causal", {True, False}),
        ("dlse", {True, False}),
    ],
)
def test_every_feature_is_sampled(field: str, values: set[Any]) -> None:
    assert {getattr(case, field) for case in CASES} == values


def test_caches_have_every_feature() -> None:
    setups = [soak.draw_cache(seed) for seed in range(1000)]
    for name in ("entries", "interleaved", "causal", "leftpad", "rows_used", "scattered"):
        assert {getattr(setup, name) for setup in setups} == {True, False}
    for name in ("page_size", "rotary_dim", "new", "rows", "batch"):
        sizes = {getattr(setup, name) for setup in setups}
        assert 0 in sizes and max(sizes) > 1


@pytest.mark.skipif(not any(engine.backend == "cpu" for engine in engines()), reason="the native engine's")
def test_short_run_finds_no_error() -> None:
    """Small problems, every array laid out at random, KV caches among them."""
    state = soak.Run(0, 0, 1, multiprocessing.Value("q", 0), Memory())
    small = [s for s, case in enumerate(CASES) if s % 4 == 3 or case.batch * case.seqlen_q * case.seqlen_k < 3000]
    for count, seed in enumerate(small[:120]):
        state.one(seed, soak.cpu_targets()[count % len(soak.cpu_targets())])
    assert state.failed == 0


@pytest.mark.skipif(not any(engine.backend == "cpu" for engine in engines()), reason="the native engine's")
def test_error_is_reported_with_its_seed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seed = next(s for s, case in enumerate(CASES) if s % 4 != 3 and case.batch * case.seqlen_q * case.seqlen_k > 100)
    state = soak.Run(seed, 0, 1, multiprocessing.Value("q", seed), Memory())
    target = soak.cpu_targets()[0]
    state.one(seed, target)
    assert state.failed == 0 and capsys.readouterr().out == ""
    calls, right = [0], soak.run

    def wrong(*arguments: Any) -> Any:
        """The second call of each direction is the one on two threads."""
        got = right(*arguments)
        calls[0] += 1
        if calls[0] == 2:
            got["out"].flat[0] += 1
        return got

    monkeypatch.setattr(soak, "run", wrong)
    state.one(seed, target)
    told = capsys.readouterr().out
    assert state.failed == 1 and "out differs on two threads" in told and f"--only {seed}" in told
    calls[0] = 1
    state.one(seed, target)
    assert state.failed == 2 and "forward: out: error" in capsys.readouterr().out
