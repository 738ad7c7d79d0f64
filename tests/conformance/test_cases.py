"""The pairwise table: every pair of values meets, and `scripts/make_cases.py` writes the table that is committed."""

from __future__ import annotations

import sys
from itertools import combinations, product

from harness import cases
from harness.paths import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
import make_cases


def test_every_possible_pair_meets() -> None:
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


def test_table_is_the_one_that_the_script_writes() -> None:
    assert make_cases.TABLE.read_text(encoding="utf-8") == make_cases.table()
