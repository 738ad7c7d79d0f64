"""Passes and the arrays that each of them reads and writes. A backend lists the passes that it supports."""

from __future__ import annotations

from typing import NamedTuple

from .inputs import Appended, Extras, Gradients, Saved, SecondGradients, Tangents


class Pass(NamedTuple):
    """Computation on the arrays of a call, with the names of its inputs and outputs.

    Optional arrays come last, so that a call without optional arrays passes a prefix of the inputs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


FORWARD = Pass("forward", ("q", "k", "v", *Extras._fields), ("out", "lse"))
BACKWARD = Pass("backward", ("q", "k", "v", *Saved._fields, *Extras._fields), Gradients._fields)
# The derivative of out and lse along the tangents, and the gradients of that derivative.
TANGENT = Pass("tangent", ("q", "k", "v", "out", "lse", *Tangents._fields, *Extras._fields), ("tout", "tlse"))
SECOND = Pass("second", ("q", "k", "v", *Saved._fields, *Tangents._fields, *Extras._fields), SecondGradients._fields)
# The forward pass and the tangent pass in one.
FORWARD_TANGENT = Pass(
    "forward_tangent", ("q", "k", "v", *Tangents._fields, *Extras._fields), (*FORWARD.outputs, *TANGENT.outputs)
)
# Writes new keys and values into the cache, in place. `out` is the rotated q.
APPEND = Pass("append", Appended._fields, ("out",))

PASSES = (FORWARD, BACKWARD, TANGENT, SECOND, FORWARD_TANGENT, APPEND)
ARRAYS = tuple(dict.fromkeys(name for one in PASSES for name in (*one.inputs, *one.outputs)))
