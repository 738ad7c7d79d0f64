"""Tests of the table of features: where it says yes a backend computes, where it says no it raises those reasons."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import capabilities, testing
from anyattn.cli import explain
from anyattn.definition.describe import Description, describe
from anyattn.definition.passes import BACKWARD, FORWARD
from anyattn.definition.problem import Array, Problem
from anyattn.definition.quantised import SCALES_OF
from anyattn.runtime import dispatch
from harness.backends import Engine
from harness.selection import every_backend

pytestmark = every_backend(interpreter=True)


@pytest.fixture(scope="module")
def found() -> list[capabilities.Feature]:
    return capabilities.collect()


def test_engines_support_what_the_table_states(engine: Engine, found: list[capabilities.Feature]) -> None:
    for feature in found:
        for pass_ in capabilities.PASSES:
            reasons = feature.refusals[engine.backend][pass_.name]
            problem = describe(feature.description._replace(pass_=pass_))
            if reasons:
                with pytest.raises(anyattn.UnsupportedProblem) as raised:
                    compute(problem, engine.backend)
                assert list(raised.value.refusals[engine.backend]) == reasons, feature.name
            else:
                for result in compute(problem, engine.backend):
                    assert not np.isnan(result.astype(np.float64)).any(), feature.name


def compute(problem: Problem, backend: str) -> Iterator[np.ndarray]:
    """The results of a call that is this problem; values are of no interest."""
    arrays = {name: make(name, described, problem) for name, described in given(problem) if "captured" not in name}
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
        **functions(problem),
    }
    if problem.pass_ is FORWARD:
        return iter(anyattn.attention_forward(**arrays, **options))
    return (x for x in anyattn.attention_backward(**arrays, **options) if x is not None)


def functions(problem: Problem) -> dict[str, Any]:
    """The functions of the table that this problem was traced from."""
    if not problem.score:
        return {}
    traced = {capabilities.FEATURES[name].options.score: each for name, each in capabilities.FUNCTIONS.items()}
    return traced[problem.score]


def given(problem: Problem) -> Iterator[tuple[str, Array]]:
    yield from problem.arrays.items()


def make(name: str, described: Array, problem: Problem) -> np.ndarray:
    """Tables of a whole, valid call; everything else is random."""
    rows = {"cu_seqlens_q": problem.seqlen_q, "cu_seqlens_k": problem.seqlen_k}
    kind = testing.numpy_dtype(described.dtype)
    if name in rows:
        return np.arange(problem.batch + 1, dtype=kind) * rows[name]
    if name in ("block_table", "cache_batch_idx"):
        return np.arange(np.prod(described.shape), dtype=kind).reshape(described.shape)
    if described.dtype in ("int32", "int64"):
        return np.ones(described.shape, kind)
    values = np.asarray(np.random.default_rng(0).standard_normal(described.shape))
    return (np.abs(values) if name in SCALES_OF.values() else values).astype(kind)


def test_every_feature_of_a_problem_is_in_the_table(found: list[capabilities.Feature]) -> None:
    problems = [describe(feature.description._replace(pass_=BACKWARD)) for feature in found]
    assert {name for problem in problems for name, _ in given(problem)} == set(BACKWARD.inputs)
    asked = {change for feature in found for change in changes(feature.description, capabilities.SMALL)}
    parser = argparse.ArgumentParser(add_help=False)
    explain.add_features(parser)
    for action in parser._actions:
        flag = action.option_strings[0]
        if flag != "--backward":
            assert flag_changes(action) <= asked, flag


def flag_changes(action: argparse.Action) -> set[str]:
    """Return what a flag of `anyattn explain` changes in the description."""
    parser = explain.add_parser(argparse.ArgumentParser().add_subparsers())
    values = {"--window": ["1", "1"], "--alignment": ["top-left"], "--stored": ["int8"]}
    given = values.get(action.option_strings[0], [] if action.nargs == 0 else ["0.5" if action.type is float else "3"])
    found = set(changes(explain.parse(parser.parse_args([action.option_strings[0], *given])), Description()))
    assert found
    return found


def changes(description: Description, plain: Description) -> Iterator[str]:
    """Yield the fields, options and optional arrays in which a description differs from a plain one."""
    yield from description.extras
    for name, value, default in zip(Description._fields, description, plain, strict=True):
        if name == "options":
            names = zip(value._fields, value, default, strict=True)
            yield from (option for option, given, usual in names if given != usual)
        elif name != "extras" and value != default:
            yield name


def test_every_engine_is_in_the_table_and_every_refusal_has_a_note(found: list[capabilities.Feature]) -> None:
    header, rows = capabilities.cells(found)
    assert header == ["feature", *(f"{name} {pass_}" for name in dispatch.names() for pass_ in capabilities.PASSES)]
    assert {len(row) for row in rows} == {len(header)}
    notes = capabilities.footnotes(found)
    quoted = {int(number) for row in rows for cell in row[1:] if cell != "yes" for number in cell[4:-1].split("][")}
    assert quoted == set(notes.values()) == set(range(1, len(notes) + 1))
