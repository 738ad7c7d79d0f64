"""The table of features says what engines do: where it says yes they compute, where it says no they raise just that."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anyattn
from anyattn.cli import explain, features
from anyattn.definition.passes import BACKWARD, FORWARD
from anyattn.definition.problem import Array, Problem
from anyattn.runtime import dispatch
from harness.backends import Engine

INTERPRETED = True  # the table is about engines that are interpreted too


@pytest.fixture(scope="module")
def found() -> list[features.Feature]:
    return features.collect()


def test_an_engine_does_what_the_table_says(engine: Engine, found: list[features.Feature]) -> None:
    for feature in found:
        for which in features.PASSES:
            reasons = feature.refusals[engine.backend][which]
            problem = features.problem(feature.flags, which)
            if reasons:
                with pytest.raises(anyattn.UnsupportedProblem) as raised:
                    compute(problem, engine.backend)
                assert list(raised.value.refusals[engine.backend]) == reasons, feature.name
            else:
                for result in compute(problem, engine.backend):
                    assert not np.isnan(result.astype(np.float64)).any(), feature.name


def compute(problem: Problem, backend: str) -> Iterator[np.ndarray]:
    """The results of a call that is this problem; values are of no interest."""
    arrays = {name: make(name, described, problem) for name, described in given(problem)}
    options: dict[str, Any] = {
        "window": (problem.interval.left, problem.interval.right),
        "chunk": problem.interval.chunk,
        "alignment": problem.alignment if problem.offset is None else "bottom-right",
        "scale": problem.scale,
        "softcap": problem.softcap,
        "dropout_p": problem.dropout_p,
        "deterministic": problem.deterministic,
        "batch_invariant": problem.batch_invariant,
        "backend": backend,
    }
    if problem.pass_ is FORWARD:
        return iter(anyattn.attention_forward(**arrays, **options))
    return (x for x in anyattn.attention_backward(**arrays, **options) if x is not None)


def given(problem: Problem) -> Iterator[tuple[str, Array]]:
    yield from problem.arrays.items()


def make(name: str, described: Array, problem: Problem) -> np.ndarray:
    """Tables of a whole, valid call; everything else is random."""
    rows = {"cu_seqlens_q": problem.seqlen_q, "cu_seqlens_k": problem.seqlen_k}
    kind = ml_dtypes.bfloat16 if described.dtype == "bfloat16" else described.dtype
    if name in rows:
        return np.arange(problem.batch + 1, dtype=kind) * rows[name]
    if name in ("block_table", "cache_batch_idx"):
        return np.arange(np.prod(described.shape), dtype=kind).reshape(described.shape)
    if described.dtype in ("int32", "int64"):
        return np.ones(described.shape, kind)
    return np.random.default_rng(0).standard_normal(described.shape).astype(kind)


def test_every_feature_of_a_problem_is_in_the_table(found: list[features.Feature]) -> None:
    problems = [features.problem(feature.flags, "backward") for feature in found]
    assert {name for problem in problems for name, _ in given(problem)} == set(BACKWARD.inputs)
    parser = argparse.ArgumentParser(add_help=False)
    explain.add_features(parser)
    asked = {flag for feature in found for flag in feature.flags.split() if flag.startswith("--")}
    assert {action.option_strings[0] for action in parser._actions} - {"--backward"} <= asked


def test_every_engine_is_in_the_table_and_every_refusal_has_a_note(found: list[features.Feature]) -> None:
    header, rows = features.cells(found)
    assert header == ["feature", *(f"{name} {which}" for name in dispatch.names() for which in features.PASSES)]
    assert {len(row) for row in rows} == {len(header)}
    notes = features.footnotes(found)
    quoted = {int(number) for row in rows for cell in row[1:] if cell != "yes" for number in cell[4:-1].split("][")}
    assert quoted == set(notes.values()) == set(range(1, len(notes) + 1))
