"""Writes tests/harness/pairwise.txt: a table in which every pair of values of two factors meets in some row.

    python scripts/make_cases.py

Greedy and seeded: the same table comes out every time. `tests/harness/cases.py` reads it and says what each value
means.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

SEED = 0
TRIES = 24
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
        *("bool", "varlen", "varlen_causal", "paged"),
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
NAMES = tuple(FACTORS)

Row = list["str | None"]
Pair = tuple[int, int, str, str]


def possible(i: int, a: str, j: int, b: str) -> bool:
    """False for pairs that no call can have: a dense bias has no packed layout."""
    values = {NAMES[i]: a, NAMES[j]: b}
    return not (values.get("mask", "").startswith("varlen") and values.get("bias", "no") != "no")


def pairs_of(row: Row) -> list[Pair]:
    chosen = [(i, value) for i, value in enumerate(row) if value is not None]
    return [(i, j, a, b) for (i, a), (j, b) in itertools.combinations(chosen, 2)]


def fill(row: Row, needed: dict[Pair, None], rng: random.Random) -> Row:
    """The row completed one factor at a time, each with the value that covers most needed pairs."""
    empty = [i for i, value in enumerate(row) if value is None]
    rng.shuffle(empty)
    for i in empty:
        scored = []
        for value in FACTORS[NAMES[i]]:
            others = [(j, other) for j, other in enumerate(row) if other is not None]
            if all(possible(i, value, j, other) for j, other in others):
                found = [(i, j, value, other) if i < j else (j, i, other, value) for j, other in others]
                scored.append((sum(pair in needed for pair in found), rng.random(), value))
        row[i] = max(scored)[2]
    return row


def cover() -> list[Row]:
    rng = random.Random(SEED)
    needed: dict[Pair, None] = {}
    for i, j in itertools.combinations(range(len(NAMES)), 2):
        for a, b in itertools.product(FACTORS[NAMES[i]], FACTORS[NAMES[j]]):
            if possible(i, a, j, b):
                needed[i, j, a, b] = None
    rows: list[Row] = []
    while needed:
        candidates = []
        for _ in range(TRIES):
            i, j, a, b = rng.choice(list(needed))
            row: Row = [None] * len(NAMES)
            row[i], row[j] = a, b
            row = fill(row, needed, rng)
            candidates.append((sum(pair in needed for pair in pairs_of(row)), row))
        best = max(candidates, key=lambda candidate: candidate[0])[1]
        rows.append(best)
        for pair in pairs_of(best):
            needed.pop(pair, None)
    return rows


def main() -> None:
    rows = cover()
    table = [list(NAMES), *[[str(value) for value in row] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(NAMES))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
