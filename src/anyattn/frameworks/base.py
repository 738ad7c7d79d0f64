"""The contract of a framework: a module that does, for one kind of array, what every public function needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..definition.inputs import Appended, Gradients, Inputs, Saved, SecondGradients, Tangents
from ..definition.options import Options, Rotation
from .scores import Stage

if TYPE_CHECKING:
    from ..runtime.dispatch import Explanation


class Framework(Protocol):
    """Arrays of one kind in, arrays of that kind out. Each function computes what it says, or refuses by name.

    Inputs come as the user gave them: a framework converts, checks kinds of arrays and prepares them. `backend` is a
    name, several separated by commas, or None: automatic choice. An int `seed` stands for rng_state.
    """

    def attention(
        self,
        inputs: Inputs,
        options: Options,
        seed: int | None,
        return_lse: bool,
        backend: str | None,
        *,
        want_lse: bool = False,
    ) -> tuple[Any, Any]:
        """Return (out, lse), with gradients if the framework has them; draw the dropout state where none is given.

        return_lse: gradients flow through lse too. want_lse: its values are wanted. With neither, lse may be None.
        """

    def forward(self, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> tuple[Any, Any]:
        """Return (out, lse) without recording gradients."""

    def backward(
        self, saved: Saved, inputs: Inputs, options: Options, seed: int | None, backend: str | None
    ) -> Gradients:
        """Return the gradients from what `forward` got and returned."""

    def tangent(
        self,
        out: Any,
        lse: Any,
        tangents: Tangents,
        inputs: Inputs,
        options: Options,
        seed: int | None,
        backend: str | None,
    ) -> tuple[Any, Any]:
        """Return (tout, tlse), the derivative along the tangents of what `forward` returned."""

    def second(
        self,
        saved: Saved,
        tangents: Tangents,
        inputs: Inputs,
        options: Options,
        seed: int | None,
        backend: str | None,
    ) -> SecondGradients:
        """Return the gradients of <dout, tout> + <dlse, tlse>."""

    def append(
        self, arrays: Appended, rotation: Rotation, backend: str | None, *, check: Callable[[Any], None]
    ) -> tuple[Any, Any]:
        """Append to the cache in place; return q (rotated) and the keys in use per sequence (None: all).

        `check` is called with the latter and raises if the attention would; it runs before anything is written.
        """

    def check(self, inputs: Inputs, options: Options, backend: str | None) -> None:
        """Raise what `forward` would raise before it computes."""

    def explain(self, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> Explanation:
        """Return which backend `forward` would take, and why not the others."""

    def warmup(
        self, inputs: Inputs, options: Options, seed: int | None, backend: str | None, *, backward: bool
    ) -> None:
        """Compile what `forward` and, if asked for, `backward` need; compute nothing."""

    def scores(self, inputs: Inputs, options: Options, queries: Any, stage: Stage, lse: Any = None) -> Any:
        """Return a stage of the scores of these queries, (batch, nheads, queries, seqlen_k), in q's dtype.

        `inputs.v` is not read. The stage "weights" needs lse. queries: None (all), a slice, or indices.
        """

    def merge(self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
        """Return (out, lse) over the union of two disjoint sets of keys."""


FUNCTIONS = (
    "attention",
    "forward",
    "backward",
    "tangent",
    "second",
    "append",
    "check",
    "explain",
    "warmup",
    "scores",
    "merge",
)
