"""What each engine computes: every feature, forward and backward, asked of the engines' own `supports`.

`anyattn info --features` prints the table, the documentation shows it, and the tests hold the engines to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..backends.base import Backend
from ..definition.problem import Problem
from ..runtime import dispatch
from . import explain
from .table import table

# Feature -> the flags of `anyattn explain` that ask for it.
FEATURES = {
    "float32": "",
    "float16": "--dtype float16",
    "bfloat16": "--dtype bfloat16",
    "float64": "--dtype float64",
    "head_dim 59": "--head-dim 59",
    "head_dim 256": "--head-dim 256",
    "head_dim 512": "--head-dim 512",
    "head_dim 1024": "--head-dim 1024",
    "head_dim_v unlike head_dim": "--head-dim-v 24",
    "scale": "--scale -0.5",
    "grouped-query heads": "--kv-heads 1",
    "causal": "--causal",
    "causal, top left": "--causal --alignment top-left",
    "offset": "--causal --offset",
    "window": "--window 3 1",
    "chunk": "--chunk 4",
    "mask": "--mask",
    "bias": "--bias",
    "alibi_slopes": "--alibi",
    "softcap": "--softcap 5",
    "sink": "--sink",
    "dropout": "--dropout 0.1",
    "lengths (seqused, leftpad)": "--seqused --leftpad",
    "packed sequences": "--varlen",
    "pages": "--paged 4",
    "packed sequences, pages": "--varlen --paged 4",
    "cache_batch_idx": "--cache-batch-idx",
    "gradient of lse": "--dlse",
    "deterministic": "--deterministic",
    "batch_invariant": "--batch-invariant",
}
PASSES = ("forward", "backward")
SIZES = "--batch 1 --heads 2 --seqlen-q 5 --seqlen-k 7 --head-dim 16"
DEVICES = ("cpu", "cuda:0")  # an engine computes a feature if it does so on the device that suits it best


@dataclass(frozen=True, slots=True)
class Feature:
    """For each engine and pass the reasons against it: none where it is computed."""

    name: str
    flags: str
    refusals: dict[str, dict[str, list[str]]]


def collect() -> list[Feature]:
    return [Feature(name, flags, _refusals(flags)) for name, flags in FEATURES.items()]


def problem(flags: str, which: str, device: str = DEVICES[0]) -> Problem:
    parser = argparse.ArgumentParser()
    explain.add_sizes(parser)
    explain.add_features(parser)
    backward = ["--backward"] if which == "backward" else []
    return explain.describe(parser.parse_args([*SIZES.split(), *flags.split(), "--device", device, *backward]))


def text(found: list[Feature]) -> str:
    """The table and, below it, the reasons."""
    notes = [f"[{number}] {reason}" for reason, number in footnotes(found).items()]
    return "\n".join([table(*cells(found), left=True), "", *notes])


def evidence(name: str) -> dict[str, tuple[str, ...]]:
    """On which hardware a backend is known to work, and how well: what its module says in EVIDENCE."""
    module = sys.modules[type(dispatch.get(name)).__module__]
    found: dict[str, tuple[str, ...]] = getattr(module, "EVIDENCE", {})
    return found


def hardware() -> str:
    """The same of all of them, as Markdown."""
    rows = [
        f"| `{name}` | {how} | {'; '.join(where)} |"
        for name in dispatch.names()
        for how, where in evidence(name).items()
    ]
    return "\n".join(["| Engine | State | Hardware |", "|---|---|---|", *rows])


def cells(found: list[Feature]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; "no [2]" refers to the second of `footnotes`."""
    numbers = footnotes(found)

    def cell(reasons: list[str]) -> str:
        return f"no {''.join(f'[{numbers[reason]}]' for reason in reasons)}" if reasons else "yes"

    header = ["feature", *(f"{name} {which}" for name in dispatch.names() for which in PASSES)]
    rows = [[f.name, *(cell(reasons) for reasons in _columns(f))] for f in found]
    return header, rows


def footnotes(found: list[Feature]) -> dict[str, int]:
    """Reason -> number, as they first appear."""
    reasons = dict.fromkeys(reason for feature in found for cell in _columns(feature) for reason in cell)
    return {reason: number for number, reason in enumerate(reasons, 1)}


def _columns(feature: Feature) -> Iterator[list[str]]:
    for passes in feature.refusals.values():
        yield from passes.values()


def _refusals(flags: str) -> dict[str, dict[str, list[str]]]:
    return {name: {which: _reasons(dispatch.get(name), flags, which) for which in PASSES} for name in dispatch.names()}


def _reasons(engine: Backend, flags: str, which: str) -> list[str]:
    asked: Any = [engine.supports(problem(flags, which, device)) for device in DEVICES]
    return min(asked, key=len)
