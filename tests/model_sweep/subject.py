"""One model: build it, find inputs, run every check."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from model_sweep import building, checks, implementations, inputs, verdicts
from model_sweep.classes import Subject
from model_sweep.inputs import Inputs
from model_sweep.verdicts import NONE, REFUSED, Judge, Verdict

Report = dict[str, Any]
SENSITIVE = 1e-2  # how much a result must change when every score is halved


def examine(subject: Subject, save: Callable[[Report], None]) -> Report:
    """Return the report about a model. `save` keeps the report before each check, because a check can end the process."""
    begin = time.perf_counter()
    report: Report = {"name": subject.name, "class": "", "reason": "", "checks": {}, "calls": {}}
    try:
        eager = building.build(subject)
    except Exception as error:
        known = isinstance(error, building.CannotBuild)
        return report | {"reason": str(error) if known else f"cannot be built: {verdicts.describe(error)}"}
    report["class"] = type(eager).__name__
    given, reason = usable(eager)
    if given is None:
        return report | {"reason": f"no inputs found: {reason}"}
    judge = Judge(eager, given)
    report["sensitivity"] = sensitivity(judge)
    for way, make in (("init", building.ours_from_configuration), ("set", building.ours_by_setting)):
        try:
            model = make(eager)
        except Exception as error:
            outcome = REFUSED if verdicts.refusal(error) else verdicts.CRASH
            report["checks"].setdefault("build", {})[way] = Verdict(outcome, text=verdicts.describe(error))
            continue
        run(judge, model, way, report, save)
    return report | {"seconds": round(time.perf_counter() - begin, 1)}


def run(judge: Judge, model: Any, way: str, report: Report, save: Callable[[Report], None]) -> None:
    """Run every check on one model and note how often it called us."""
    before = implementations.CALLS[0]
    for name in checks.CHECKS:
        report["now"] = f"{name} ({way})"
        save(report)
        verdict = judge.judge(name, model)
        if verdict.outcome != NONE or verdict.text.startswith("eager"):
            report["checks"].setdefault(name, {})[way] = verdict
        if name == "dense":
            report["calls"][way] = implementations.CALLS[0] - before
    report.pop("now")


def usable(model: Any) -> tuple[Inputs | None, str]:
    """Return the first inputs on which eager gives finite numbers, or the reason why there are none."""
    reason = "its forward function is not understood"
    for given in inputs.guesses(model):
        found = verdicts.attempt(checks.dense, model, given)
        if isinstance(found, Exception):
            reason = verdicts.describe(found)
        elif not found or not all(bool(x.isfinite().any()) for x in found.values()):
            reason = "eager's results are not finite"
        else:
            return given, ""
    return None, reason


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
