"""One model: build it, find inputs, run every check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from model_sweep import building, checks, implementations, inputs, multimodal, verdicts
from model_sweep.classes import Subject
from model_sweep.exceptions import KNOWN
from model_sweep.inputs import FIRST_TOKEN, Inputs
from model_sweep.table import DULL
from model_sweep.verdicts import NONE, REFUSED, UPSTREAM, WRONG, Judge, Verdict

Report = dict[str, Any]
MOST_INPUTS = 8  # that are looked at
BORROWED = 5  # attributes that a configuration may lack


def examine(name: str, save: Callable[[Report], None], compile_too: bool | None = None) -> Report:
    """Return the report about a model; `save` keeps it before each check, which may end the process.

    Compiled, exported and traced models are checked for some names, unless `compile_too` says otherwise.
    """
    begin = time.process_time()
    subject = Subject(*name.split("+"))
    report: Report = {"name": name, "class": "", "reason": "", "checks": {}, "calls": {}, "inputs": {}}
    try:
        eager = building.build(subject)
    except Exception as error:
        known = isinstance(error, building.CannotBuild)
        return report | {"reason": str(error) if known else f"cannot be built: {verdicts.describe(error)}"}
    report["class"] = type(eager).__name__
    judges = dict(find_inputs(eager, report))
    compiled = name in checks.COMPILED_MODELS if compile_too is None else compile_too
    for way, make in (("init", building.ours_from_configuration), ("set", building.ours_by_setting)):
        try:
            model = make(eager)
        except Exception as error:
            outcome = REFUSED if verdicts.refusal(error) else verdicts.CRASH
            report["checks"].setdefault("build", {})[way] = Verdict(outcome, text=verdicts.describe(error))
            continue
        for kind, judge in judges.items():
            names = [x for x in checks.CHECKS if x not in checks.COMPILED or (compiled and way == "init" and not kind)]
            run(judge, model, way, kind, names, report, save)
    return report | {"seconds": round(time.process_time() - begin, 1)}


def find_inputs(eager: Any, report: Report) -> Iterator[tuple[str, Judge]]:
    """Yield a judge for the plain inputs of a model, and one for each kind of features that its text can have."""
    given, reason = best(eager)
    if given is None:
        report["reason"] = f"no inputs found: {reason}"
    else:
        judge = Judge(eager, given)
        report["sensitivity"] = sensitivity(judge)
        report["mixing"] = mixing(judge)
        report["inputs"]["plain"] = shapes(given)
        yield "", judge
    for modality, kind in multimodal.MODALITIES.items():
        if multimodal.takes(eager, kind):
            given, reason = usable(eager, multimodal.guesses(eager, modality))
            report["inputs"][modality] = reason if given is None else shapes(given)
            if given is not None:
                report["reason"] = ""
                yield modality, Judge(eager, given)


def best(eager: Any) -> tuple[Inputs | None, str]:
    """Return the first inputs for which attention matters, or else the first that are usable: one key is no choice."""
    guesses, first, reason = inputs.guesses(eager), None, ""
    for _ in range(MOST_INPUTS):
        given, why = usable(eager, guesses)
        if given is None:
            reason = why
            break
        before = implementations.DULL_CALLS[0]
        change = sensitivity(Judge(eager, given))
        if change is None or change >= DULL or implementations.DULL_CALLS[0] == before:
            return given, ""
        first = first or given
    return first, reason


def shapes(given: Inputs) -> str:
    """Return the shapes of the inputs, to read."""
    return ", ".join(f"{name} {tuple(getattr(x, 'shape', ()))}" for name, x in given.values.items())


def run(
    judge: Judge, model: Any, way: str, kind: str, names: list[str], report: Report, save: Callable[[Report], None]
) -> None:
    """Run the named checks on one model and note how often it called us."""
    before = implementations.CALLS[0]
    for name in names:
        label = f"{kind}: {name}" if kind else name
        report["now"] = f"{label} ({way})"
        save(report)
        verdict = judge.judge(name, model)
        if verdict.outcome == WRONG and (report["name"], name) in KNOWN:
            verdict = Verdict(UPSTREAM, verdict.error, KNOWN[report["name"], name])
        if verdict.outcome != NONE or verdict.text.startswith("eager"):
            report["checks"].setdefault(label, {})[way] = verdict
        if name == "dense":
            report["calls"][f"{kind} {way}".strip()] = implementations.CALLS[0] - before
    report.pop("now")


def usable(model: Any, guesses: Iterator[Inputs]) -> tuple[Inputs | None, str]:
    """Return the first inputs on which eager gives finite numbers, or the reason why there are none."""
    reason, tries = "", 0
    for given in guesses:
        found = verdicts.attempt(checks.dense, model, given)
        while isinstance(found, AttributeError) and tries < BORROWED and building.borrow(model.config, str(found)):
            found, tries = verdicts.attempt(checks.dense, model, given), tries + 1
        if isinstance(found, Exception):
            reason = reason or verdicts.describe(found)
        elif not found or not all(bool(x.isfinite().any()) for x in found.values()):
            reason = reason or "eager's results are not finite"
        else:
            return given, ""
    return None, reason or "its forward function is not understood"


def sensitivity(judge: Judge) -> float | None:
    """Return how much results change when every score is halved; None where a model never asks for its attention."""
    want = judge.want("dense")
    try:
        model = building.ours_by_setting(judge.eager, implementations.DULL)
    except Exception:
        return None
    got = verdicts.attempt(checks.dense, model, judge.inputs)
    if isinstance(got, Exception) or isinstance(want, Exception):
        return None
    return round(verdicts.distance(got, want), 4)


def mixing(judge: Judge) -> float | None:
    """Return how much a token changes the result two tokens later; None where the inputs are not tokens."""
    name = "decoder_input_ids" if "decoder_input_ids" in judge.inputs.values else "input_ids"
    ids, want = judge.inputs.values.get(name), judge.want("dense")
    if ids is None or ids.ndim != 2 or isinstance(want, Exception):
        return None
    changed = ids.clone()
    changed[:, -3] = FIRST_TOKEN
    got = verdicts.attempt(checks.dense, judge.eager, judge.inputs.having(**{name: changed}))
    if isinstance(got, Exception):
        return None
    last = [
        {key: x[:, -1] for key, x in found.items() if x.ndim > 2 and x.shape[1] == ids.shape[1]}
        for found in (got, want)
    ]
    return round(verdicts.distance(*last), 4) if last[0] else None
