"""Every case on every engine, forward and backward, against float64 within the budget that accuracy.py derives.

NaN surrounds inputs, results start as NaN between guards, no input may change. What an engine refuses must raise with
its reasons.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition import accuracy
from anyattn.testing import Case, CaseInputs, make_inputs
from harness.backends import Engine
from harness.cases import ALL, SMALL, sampled
from harness.checks import bits, refused, run
from harness.selection import INTERPRETED_PROGRAMS, best_target, every_backend, programs


@lru_cache(maxsize=2)
def inputs_of(case: Case) -> CaseInputs:
    return make_inputs(case)


@lru_cache(maxsize=24)  # the long matrix comes back to a row for each engine
def expected(case: Case, direction: str) -> dict[str, accuracy.Expected]:
    return testing.expected(inputs_of(case), direction)


@every_backend(interpreter=True, refusals=True)
@pytest.mark.parametrize("direction", testing.PASSES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_engine_equals_reference(case: Case, direction: str, engine: Engine) -> None:
    inputs = inputs_of(case)
    before = inputs.bytes()
    if refused(inputs, direction, engine):
        return
    got = run(inputs, direction, engine)
    assert inputs.bytes() == before, "an input, or memory around it, was written"
    assert not testing.compare(expected(case, direction), got)


@every_backend(interpreter=True, refusals=True)
@pytest.mark.full
@pytest.mark.parametrize("seed", range(160))
def test_engine_equals_reference_on_sampled_cases(seed: int, engine: Engine) -> None:
    """10 rows a seed: nearly every triple of features meets somewhere."""
    wrong = []
    for case in sampled(seed, 10):
        for direction in testing.PASSES:
            inputs = inputs_of(case)
            if not refused(inputs, direction, engine):
                lines = testing.compare(expected(case, direction), run(inputs, direction, engine))
                wrong += [f"{case} {direction}: {line}" for line in lines]
    assert not wrong


def adds_nothing(engine: Engine, case: Case) -> bool:
    """Return whether a test repeats another: above the choice of a backend nothing depends on its instruction set."""
    if engine.interpreted:
        return 3 * programs(case, "forward") > INTERPRETED_PROGRAMS
    return engine.backend == "cpu" and engine != best_target()


@every_backend(interpreter=True, refusals=True, full_if=adds_nothing)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_public_functions_have_the_bits_of_attention_forward(case: Case, engine: Engine) -> None:
    """attention, attention_varlen and attention_with_kvcache give attention_forward's bits, with and without lse."""
    inputs = inputs_of(case)
    if refused(inputs, "forward", engine):
        return
    given = {**inputs.arguments, "backend": engine.backend}
    out, lse = anyattn.attention_forward(**given)
    if inputs.packed:
        given |= {name: given.get(name) for name in ("cu_seqlens_k",)}
        function = anyattn.attention_varlen
    elif "block_table" in given:
        if given.pop("dropout_p"):
            return  # a cache has no dropout
        for name, other in (("k", "k_cache"), ("v", "v_cache"), ("seqused_k", "cache_seqlens")):
            given[other] = given.pop(name)
        function = anyattn.attention_with_kvcache
    else:
        function = anyattn.attention
    got = function(**given, return_lse=True)
    assert np.array_equal(bits(got[0]), bits(out)) and np.array_equal(bits(got[1]), bits(lse))
    assert np.array_equal(bits(function(**given)), bits(out))
