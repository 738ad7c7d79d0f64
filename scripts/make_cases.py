"""Write tests/harness/pairwise.txt: a table in which every pair of values of two columns occurs in some row.

    python scripts/make_cases.py

The table is always the same. `tests/harness/cases.py` reads it and defines what each value means.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, product
from pathlib import Path

from covertable import make
from covertable.shortcuts import Constraint

SEED = 11  # of the first 16 seeds, one whose rows contain the most triples of values
TABLE = Path(__file__).parent.parent / "tests" / "harness" / "pairwise.txt"
FACTORS: dict[str, tuple[str, ...]] = {
    "seqlen_q": ("0", "1", "63", "111", "129", "517"),
    "seqlen_k": ("0", "1", "63", "111", "129", "517"),
    "head_dim": ("1", "8", "40", "59", "64", "96", "128", "192", "256"),
    "head_dim_v": ("same", "8", "64", "129"),
    "group": ("1", "4", "8"),
    "batch": ("0", "1", "3"),
    "mask": (
        *("none", "causal", "causal_topleft", "offset", "window", "window_causal", "chunk", "leftpad", "seqused"),
        *("bool", "indices", "indices_heads", "varlen", "varlen_causal", "paged"),
    ),
    "softcap": ("0", "2.5"),
    "bias": ("no", "full", "b1", "h1", "row"),
    "alibi": ("no", "h", "bh"),
    "sink": ("0", "1"),
    "dropout": ("0", "0.3"),
    "scale": ("default", "negative", "0"),
    "layout": ("bshd", "bhsd", "packed"),
    "dlse": ("0", "1"),
    "dtype": ("float64", "float32", "float16", "bfloat16"),
}

Row = dict[str, str]


def is_possible(row: Row) -> bool:
    """Return whether a call can combine the mask with the bias. Packed sequences have no dense bias."""
    return not row["mask"].startswith("varlen") or row["bias"] == "no"


def cover() -> list[Row]:
    """Return rows in which every possible pair of values occurs."""
    rows = make(FACTORS, constraints=[Constraint().fn(["mask", "bias"], is_possible)])
    return [{name: row[name] for name in FACTORS} for row in rows]


def spread(rows: list[Row]) -> list[Row]:
    """Return the rows with a new random value for each value that no pair needs.

    covertable writes a factor's first value there. Most rows would have no dropout, no softcap and no query.
    """
    rng, rows = random.Random(SEED), list(rows)
    met = Counter(pair for row in rows for pair in combinations(row.items(), 2))
    for i, name in product(range(len(rows)), FACTORS):
        row = rows[i] | {name: rng.choice(FACTORS[name])}
        before, after = (Counter(combinations(items, 2)) for items in (rows[i].items(), row.items()))
        if is_possible(row) and all(met[pair] > 1 for pair in before - after):
            met.update(after)
            met.subtract(before)
            rows[i] = row
    return rows


def table() -> str:
    """Return the table as text: a line of names, and a line of values for each row."""
    rows = spread(cover())
    columns = [[name, *(row[name] for row in rows)] for name in FACTORS]
    padded = [[value.ljust(max(map(len, column))) for value in column] for column in columns]
    return "".join(f"{'  '.join(line).rstrip()}\n" for line in zip(*padded, strict=True))


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
