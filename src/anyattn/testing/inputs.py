"""Inputs of a case: the arguments of its call, and the positions of each sequence in the arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..definition.inputs import GRADIENTS
from ..definition.passes import FORWARD, Pass
from ..definition.problem import Problem
from .cases import Case
from .layouts import scattered
from .problems import describe

Array = npt.NDArray[Any]
Index = Any  # of some rows: a slice, or a tuple of indices


@dataclass(frozen=True)
class Span:
    """Sequence of a case: lengths in use, left padding, position of query 0, and indices of its rows and slots."""

    index: int
    n_q: int
    n_k: int
    leftpad: int
    offset: int
    rows: Index  # of the n_q rows in q without heads: q[rows] is (n_q, nheads, head_dim)
    slots: Index  # of the n_k slots in k


@dataclass
class CaseInputs:
    """Inputs of `attention_forward` and `attention_backward` for one case, and the memory around them."""

    case: Case
    arguments: dict[str, Any]  # of attention_forward, q, k and v included
    spans: list[Span]
    rows: int  # seqlen_q of the problem
    slots: int  # seqlen_k of the problem
    dout: Array
    dlse: Array | None
    buffers: list[Array] = field(default_factory=list)  # the memory of most arrays, which are views

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.arguments

    @property
    def lse_shape(self) -> tuple[int, ...]:
        q = self.arguments["q"]
        return (q.shape[1], q.shape[0]) if self.packed else (q.shape[0], q.shape[2], q.shape[1])

    @property
    def rng_state(self) -> Array:
        state: Array = self.arguments["rng_state"]
        return state

    @cached_property
    def dout64(self) -> Array:
        return self.dout.astype(np.float64)

    @cached_property
    def dlse64(self) -> Array | None:
        return None if self.dlse is None else self.dlse.astype(np.float64)

    def lse_rows(self, span: Span, h: int) -> tuple[Any, ...]:
        """Return the index of a head's rows in lse."""
        return (h, span.rows) if self.packed else (span.rows[0], h, span.rows[1])

    def bytes(self) -> list[bytes]:
        """Return the contents of the memory in and around the inputs, to check that a call writes none of it."""
        return [buffer.tobytes() for buffer in self.buffers]

    def saved(self, out: Array, lse: Array) -> tuple[Array, Array]:
        """Return out and lse for the backward pass: unchanged, or copies with the layout of the inputs."""
        if self.case.layout != "any":
            return out, lse
        rng = np.random.default_rng(self.case.seed)
        return scattered(out, rng)[0], scattered(lse, rng)[0]

    def describe(self, pass_: Pass = FORWARD) -> tuple[Problem, dict[str, Any]]:
        """Return the validated problem of a pass, and the arrays of the forward pass by name."""
        if pass_ is FORWARD:
            return describe(self.arguments)
        out, lse = np.zeros(self.dout.shape, self.dout.dtype), np.zeros(self.lse_shape, self.compute_dtype)
        saved = {"out": out, "lse": lse, "dout": self.dout, "dlse": self.dlse, **_with_axes_of_bias(self.tangents)}
        given = {name: x for name, x in saved.items() if name in pass_.inputs and x is not None}
        return describe(self.arguments, given, pass_)

    @cached_property
    def tangents(self) -> dict[str, Array]:
        """Tangents of the inputs; every fourth is absent. Where an input is NaN, its tangent is too."""
        rng = np.random.default_rng(self.case.seed + 1)
        found = {}
        for index, name in enumerate(name for name in ("q", "k", "v", *GRADIENTS) if name in self.arguments):
            primal = self.arguments[name]
            values = rng.standard_normal(primal.shape)
            if (self.case.seed + index) % 4 != 3:
                found[f"t{name}"] = np.where(np.isnan(primal.astype(np.float64)), np.nan, values).astype(primal.dtype)
        return found

    @property
    def tangents64(self) -> dict[str, Array]:
        """The tangents in float64, with four dimensions for a bias."""
        return _with_axes_of_bias({name: x.astype(np.float64) for name, x in self.tangents.items()})

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.case.dtype == "float64" else np.float32)


def _with_axes_of_bias(tangents: dict[str, Array]) -> dict[str, Array]:
    """Return the tangents with four dimensions for a bias, as the API passes them to a backend."""
    if "tbias" not in tangents:
        return tangents
    bias = tangents["tbias"]
    return {**tangents, "tbias": bias.reshape((1,) * (4 - bias.ndim) + bias.shape)}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of that name; bfloat16 and float8 are dtypes of ml_dtypes."""
    if name != "bfloat16" and not name.startswith("float8"):
        return np.dtype(name)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def has_dtype(name: str) -> bool:
    """Return whether NumPy arrays of this dtype are available; bfloat16 and float8 need ml_dtypes."""
    try:
        numpy_dtype(name)
    except ImportError:
        return False
    return True
