"""Verdicts about a model, from comparisons of its results."""

from __future__ import annotations

import copy
import functools
import math
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import anyattn
from model_sweep import building, checks
from model_sweep.checks import Check, NotApplicable, Tensors
from model_sweep.inputs import Inputs

RIGHT, WRONG, CRASH, REFUSED = "right", "wrong", "crash", "refused"
UPSTREAM, NONE = "upstream", "not applicable"
# A tensor whose numbers are all smaller than this part of the largest is noise: gradients of key biases are.
SMALL = 1e-3
FORBIDDEN = 1e8
FLOAT32 = 2e-4  # the largest error of a right result, relative to the largest number of the same tensor
SHRINKS = 20  # how much smaller an error of rounding is in float64; eager computes its softmax in float32 there, too


class Verdict(NamedTuple):
    """The outcome of one check, the largest relative error, and a reason."""

    outcome: str
    error: float = 0.0
    text: str = ""


def attempt(check: Check, model: Any, inputs: Inputs) -> Tensors | Exception:
    """Return what a check computes, or the exception that it raises."""
    try:
        return check(model, inputs)
    except Exception as error:
        return error


def distance(got: Tensors, want: Tensors) -> float:
    """Return the largest error, relative to the largest number of each tensor; infinite where shapes differ."""
    if got.keys() != want.keys():
        return math.inf
    largest = max((float(x[ordinary(x)].abs().max()) for x in want.values() if ordinary(x).any()), default=0.0)
    return max((difference(got[name], want[name], SMALL * largest) for name in want), default=math.inf)


def difference(one: Tensor, other: Tensor, floor: float) -> float:
    """Return the largest error of one tensor, relative to its largest number but at least to `floor`."""
    if one.shape != other.shape:
        return math.inf
    if not one.numel():
        return 0.0
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else 1.0
    numbers = ordinary(other)
    if not torch.equal(one[~numbers].nan_to_num(), other[~numbers].nan_to_num()):
        return math.inf
    one, other = one[numbers].double(), other[numbers].double()
    if not one.numel():
        return 0.0
    error = (one - other).abs().max() / max(float(other.abs().max()), floor, 1e-30)
    return float(error) if error.isfinite() else math.inf


def ordinary(x: Tensor) -> Tensor:
    """Tell which numbers are results: not NaN or infinite, nor the constant that stands where a token is forbidden."""
    return x.isfinite() & (x.abs() < FORBIDDEN)


def refusal(error: BaseException) -> bool:
    """Tell whether this is one of our own errors, with the advice that it owes."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = str(Path(anyattn.__file__).parent) in last
    return (
        ours and isinstance(error, ValueError | NotImplementedError) and any(x in str(error) for x in ("eager", "sdpa"))
    )


def describe(error: BaseException) -> str:
    """Return the type, the text and the place of an exception in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


class Judge:
    """Compares one model with eager, and asks float64 and "sdpa" where they differ."""

    def __init__(self, eager: Any, inputs: Inputs) -> None:
        self.eager, self.inputs = eager, inputs
        self.wanted: dict[str, Tensors | Exception] = {}

    def want(self, name: str) -> Tensors | Exception:
        if name not in self.wanted:
            self.wanted[name] = attempt(checks.CHECKS[name], self.eager, self.inputs)
        return self.wanted[name]

    def judge(self, name: str, model: Any) -> Verdict:
        want = self.want(name)
        if isinstance(want, NotApplicable):
            return Verdict(NONE, text=str(want))
        if isinstance(want, Exception):
            return Verdict(NONE, text=f"eager raises {describe(want)}")
        got = attempt(checks.CHECKS[name], model, self.inputs)
        if isinstance(got, NotApplicable):
            return Verdict(WRONG, text=str(got))
        if isinstance(got, Exception):
            return Verdict(REFUSED if refusal(got) else CRASH, text=describe(got))
        error = distance(got, want)
        if error <= FLOAT32:
            return Verdict(RIGHT, error)
        return self.look_again(name, model, got, error)

    def look_again(self, name: str, model: Any, got: Tensors, error: float) -> Verdict:
        """Decide about a difference: rounding, chance, a fault of eager's, or ours."""
        want = self.wanted[name]
        assert not isinstance(want, Exception)
        for other, reason in ((self.eager, "eager is not deterministic"), (self.twin, "no two models are alike")):
            again = attempt(checks.CHECKS[name], other, self.inputs)
            if isinstance(again, Exception) or distance(again, want) > FLOAT32:
                return Verdict(NONE, error, reason)
        if self.is_rounding(name, model, want, error):
            return Verdict(RIGHT, error, "but for rounding")
        if "packed" in name:
            parts = attempt(checks.alone, self.eager, self.inputs)
            if not isinstance(parts, Exception) and distance(got, parts) <= FLOAT32:
                return Verdict(RIGHT, error, "as each sequence alone; eager mixes them")
        other = self.sdpa(name)
        if other is not None and distance(got, other) <= FLOAT32:
            return Verdict(UPSTREAM, error, "equal to sdpa, which differs from eager")
        differs = "" if other is None or distance(other, want) <= FLOAT32 else "; sdpa differs from eager too"
        return Verdict(WRONG, error, f"differs by {error:.2g}{differs}")

    @functools.cached_property
    def twin(self) -> Any:
        """Return eager's model, built once more."""
        try:
            return building.ours_from_configuration(self.eager, "eager")
        except Exception:
            return self.eager

    def is_rounding(self, name: str, model: Any, want: Tensors, error: float) -> bool:
        """Tell whether float64 agrees, or without it, whether eager reacts as much to changes of the last digit."""
        check = checks.CHECKS[name]
        exact = [attempt(check, copy.deepcopy(x).double(), self.inputs) for x in (self.eager, model)]
        if not any(isinstance(x, Exception) for x in exact):
            exact_error = distance(exact[1], exact[0])  # type: ignore[arg-type]
            return exact_error < min(error / SHRINKS, FLOAT32)
        changed = copy.deepcopy(self.eager)
        with torch.no_grad():
            for x in changed.parameters():
                x.mul_(1 + 1e-6 * torch.randn(x.shape)) if x.is_floating_point() else x
        spread = attempt(check, changed, self.inputs)
        return not isinstance(spread, Exception) and error < min(10 * distance(spread, want), 100 * FLOAT32)

    def sdpa(self, name: str) -> Tensors | None:
        try:
            model = building.ours_by_setting(self.eager, "sdpa")
        except Exception:
            return None
        found = attempt(checks.CHECKS[name], model, self.inputs)
        return None if isinstance(found, Exception) else found
