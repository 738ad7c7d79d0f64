"""The pairwise table: every pair of values meets, and `scripts/make_cases.py` writes the table that is committed."""

from __future__ import annotations

import sys
from itertools import combinations, product

import pytest

from anyattn import testing
from harness import cases
from harness.backends import Engine
from harness.paths import SCRIPTS
from harness.selection import is_expensive, takes_part

sys.path.insert(0, str(SCRIPTS))
import make_cases


def test_every_possible_pair_of_features_occurs() -> None:
    rows = cases._table()
    met = {pair for row in rows for pair in combinations(row.items(), 2)}
    for (name, values), (other, others) in combinations(make_cases.FACTORS.items(), 2):
        for pair in product([(name, value) for value in values], [(other, value) for value in others]):
            possible = make_cases.is_possible({"mask": "", "bias": "no", **dict(pair)})
            assert (pair in met) == possible, pair
    assert all(map(make_cases.is_possible, rows))


def test_values_are_spread() -> None:
    """Each value has at least half of its share of the rows, so that features meet in threes and fours as well."""
    rows = cases._table()
    for name, values in make_cases.FACTORS.items():
        for value in values:
            share = sum(row[name] == value for row in rows) * len(values) / len(rows)
            assert share > 0.5, f"{name}={value} has {share:.2f} of its share"


def test_table_equals_the_output_of_its_script() -> None:
    assert make_cases.TABLE.read_text(encoding="utf-8") == make_cases.table()


@pytest.mark.parametrize("direction", testing.PASSES)
def test_every_value_runs_on_the_interpreter(direction: str) -> None:
    """Check that cases left to `make full` for their cost omit no feature from the common run."""
    rows, triton = cases._table(), Engine("triton")
    kept = []
    for row, case in zip(rows, cases.PAIRWISE, strict=True):
        if takes_part(triton, case=case) and not is_expensive(triton, case=case, direction=direction):
            kept.append(row)
    for name, values in make_cases.FACTORS.items():
        assert {row[name] for row in kept} == set(values), name
