"""The page of the documentation that lists every architecture: `docs/use-with/transformers-models.md`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from model_sweep.verdicts import CRASH, NONE, REFUSED, RIGHT, UPSTREAM, WRONG

Report = dict[str, Any]
DULL = 2e-3  # ten times the tolerance

PAGE = """\
# Every architecture of transformers and diffusers

This page lists, for each model, whether anyattn gives the results of the model's own attention. `make models`
writes it: it builds a tiny model with random weights of every architecture of transformers {transformers} and of every
transformer of diffusers {diffusers}. Then it compares `attn_implementation="anyattn"` with `"eager"`, and
`use_anyattn()` with torch's own attention. It tries dense and padded batches, gradients, generation with dynamic and
static caches, packed rows, attention weights, and text with images, sounds and videos. A difference that rounding does
not explain is a failure.

{counts}

The results mean:

* *right*: results are equal to eager in every check that eager itself passes.
* *eager*: the model computes attention with its own code, with or without anyattn.
* *refused*: the model raises an error that says what works instead.
* *upstream*: eager itself differs from SDPA, and anyattn agrees with SDPA. Otherwise the remark names the cause in
  transformers.
* *not run*: no tiny model or no inputs were found.

## transformers

| architecture | class | result | remarks |
|---|---|---|---|
{transformers_rows}

## diffusers

| class | result | remarks |
|---|---|---|
{diffusers_rows}
"""


def page(reports: list[Report], versions: dict[str, str]) -> str:
    """Return the page for the reports of a whole sweep."""
    models = [x for x in reports if not x["name"].startswith("diffusers/")]
    others = [x for x in reports if x["name"].startswith("diffusers/")]
    rows = [f"| {x['name']} | {x['class']} | {result(x)} | {remarks(x)} |" for x in models]
    return PAGE.format(
        counts=counted(models, "architectures of transformers") + "\n" + counted(others, "classes of diffusers"),
        transformers_rows="\n".join(rows),
        diffusers_rows="\n".join(f"| {x['class']} | {result(x)} | {remarks(x)} |" for x in others),
        **versions,
    )


def counted(reports: list[Report], what: str) -> str:
    counts = Counter(result(x) for x in reports)
    return f"* {len(reports)} {what}: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()) + "."


def outcomes(report: Report) -> Iterable[tuple[str, str, str, str]]:
    """Yield (check, way, outcome, text) of every check."""
    for check, ways in report["checks"].items():
        for way, (outcome, _, text) in ways.items():
            yield check, way, outcome, text


def result(report: Report) -> str:
    """Return the worst outcome of a model in one word."""
    found = {outcome for _, _, outcome, _ in outcomes(report)}
    for bad in (WRONG, CRASH):
        if bad in found:
            return bad
    if not found or report.get("reason"):
        return "not run"
    if any(check == "build" for check, _, outcome, _ in outcomes(report) if outcome == REFUSED) or found <= {
        REFUSED,
        NONE,
    }:
        return REFUSED
    if UPSTREAM in found:
        return UPSTREAM
    return RIGHT if any(report["calls"].values()) else "eager"


def insensitive(report: Report) -> str:
    """Return a remark on a model whose results hardly depend on attention, which therefore proves little."""
    if any(report["calls"].values()):
        what, change = "halved scores change", report.get("sensitivity")
    else:
        what, change = "another token changes", report.get("mixing")
    return f"{what} its result by {change:.1g} only" if change is not None and change < DULL else ""


def remarks(report: Report) -> str:
    """Return what there is to say beyond the result: which checks, and why."""
    if report.get("reason"):
        return tidy(report["reason"])
    found: dict[tuple[str, str], list[str]] = {}
    for check, way, outcome, text in outcomes(report):
        if outcome != RIGHT or text:
            found.setdefault((outcome, reason(outcome, text)), []).append(f"{check} ({way})")
    texts = [f"{outcome}: {', '.join(both(checks))}{text}" for (outcome, text), checks in found.items()]
    return "; ".join(filter(None, [*texts, insensitive(report)]))


def both(checks: list[str]) -> list[str]:
    """Join the two ways of one check."""
    names = list(dict.fromkeys(check.rsplit(" (", 1)[0] for check in checks))
    return [
        x if f"{x} (init)" in checks and f"{x} (set)" in checks else next(c for c in checks if c.startswith(f"{x} ("))
        for x in names
    ]


def reason(outcome: str, text: str) -> str:
    if outcome == WRONG:
        return ""
    return f": {tidy(text)}" if text else ""


def tidy(text: str) -> str:
    """Return a text that fits a cell: without numbers that change from run to run."""
    text = re.sub(r"\s*\(\w+\.py:\d+\)", "", text)
    text = re.sub(r" by [\d.e+-]+", "", text).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 160 else text[:157] + "..."
