"""Problem of a call, and its arrays in the form of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ..arguments import explicit
from ..definition.inputs import flatten
from ..definition.passes import BACKWARD, FORWARD, Pass
from ..definition.problem import Problem, described
from ..definition.validate import make_problem
from ..frameworks import framework_of
from ..frameworks.score_arguments import DESCRIPTION

Arrays = dict[str, npt.NDArray[Any]]


def describe(
    arguments: Mapping[str, Any], saved: Mapping[str, Any] | None = None, pass_: Pass = BACKWARD
) -> tuple[Problem, Arrays]:
    """Return the validated problem of a call, and its arrays by name, as NumPy arrays.

    Args:
        arguments: arguments of `attention_forward`, on NumPy arrays or torch tensors.
        saved: further arrays of the pass: out, lse, dout and perhaps dlse for the backward pass. None: forward pass.
        pass_: the pass, if `saved` is given.
    """
    given = dict(arguments)
    q, k, v = (given.pop(name) for name in ("q", "k", "v"))
    inputs, options, seed, *_ = explicit(q, k, v, given, "describe", DESCRIPTION)
    framework: Any = framework_of(q)  # the functions used below are not part of the protocol
    prepared = described(FORWARD.inputs, flatten(framework.prepare(inputs, seed)), lambda x: x)
    metadata = {name: framework.adapter.describe(x) for name, x in {**prepared, **(saved or {})}.items()}
    problem = make_problem(metadata, options, FORWARD if saved is None else pass_)
    return problem, {name: framework.adapter.numpy(x) for name, x in prepared.items()}


def to_numpy(array: Any) -> npt.NDArray[Any]:
    """Return an array in the form of the reference: in host memory, bfloat16 as its bits."""
    framework: Any = framework_of(array)
    found: npt.NDArray[Any] = framework.adapter.numpy(array)
    return found
