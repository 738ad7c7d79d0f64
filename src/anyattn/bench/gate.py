"""Correctness gate: a provider with a wrong result is not timed.

Results are compared with float64 within budgets derived from the problem. For large workloads a sample is compared.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .. import testing
from ..definition import accuracy, reference
from ..definition.accuracy import Expected
from ..definition.dtypes import widen
from .inputs import Inputs

if TYPE_CHECKING:
    from torch import Tensor

SPREAD = (0.8, 1.25)  # accepted mean of squared deviations from the average over dropout, in units of the variance


class Gate:
    """Float64 values of a workload, computed once and compared with the results of all providers."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @cached_property
    def expected(self) -> dict[str, Expected]:
        """Compute the results to compare, in the order in which providers return them."""
        inputs = self.inputs
        names = ("dq", "dk", "dv") if inputs.workload.backward else ("out",)
        found = testing.expected_results(
            inputs.arguments(), inputs.dout if inputs.workload.backward else None, random=True
        )
        return {name: found[name] for name in names}

    def wrong(self, results: list[Tensor], own_dropout: bool = False) -> str | None:
        """Return how results (out, or dq, dk and dv, in the layouts of the inputs) differ from float64, or None.

        own_dropout: the provider drops other entries than the definition, so only averages and spread are compared.
        """
        inputs = self.inputs
        arrays = (inputs.q, inputs.k, inputs.v) if inputs.workload.backward else (inputs.dout,)
        shapes = [tuple(x.shape) for x in arrays]
        if [tuple(x.shape) for x in results] != shapes:
            return f"shapes {[tuple(x.shape) for x in results]} must be {shapes}"
        if own_dropout:
            return _wrong_spread(inputs, results[0])
        got = dict(zip(self.expected, map(testing.to_numpy, results), strict=True))
        return "; ".join(accuracy.check(self.expected, got)) or None

    def errors(self, results: list[Tensor]) -> dict[str, float]:
        """Return the largest absolute error of each result."""
        pairs = zip(self.expected.items(), results, strict=True)
        return {name: want.error(testing.to_numpy(got)) for (name, want), got in pairs}


def _wrong_spread(inputs: Inputs, out: Tensor) -> str | None:
    """Compare the spread of out with theory: mean sum_j P_ij v_j, variance p / (1 - p) sum_j P_ij^2 v_j^2."""
    odds = inputs.workload.dropout_p / (1.0 - inputs.workload.dropout_p)
    problem, arrays = testing.describe(inputs.arguments())
    parts = testing.sample(problem, arrays, backward=False)
    got, squares = widen(testing.to_numpy(out), problem.dtype), []
    for head in reference.heads(problem, arrays, parts):
        variance = odds * (head.p**2 @ head.v**2)
        squares.append(((got[head.rows_q] - head.p @ head.v) ** 2 / variance).ravel())
    mean = float(np.concatenate(squares).mean())
    if not SPREAD[0] <= mean <= SPREAD[1]:
        return f"dropout: the spread is {mean:.2f} of the expected spread"
    return None
