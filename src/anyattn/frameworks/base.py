"""Protocol of a framework: a module with the functions that the public API needs for one kind of array."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..definition.inputs import Appended, Gradients, Inputs, Saved, SecondGradients, Tangents
from ..definition.options import Options, Rotation
from .score_arguments import Call, ScoreFunctions, Use
from .scores import Stage

if TYPE_CHECKING:
    from ..runtime.dispatch import Explanation


class Framework(Protocol):
    """Functions on arrays of one kind, which return arrays of that kind or raise an error that names the argument.

    Inputs arrive as the user passed them. A framework converts them, checks the kinds of arrays and prepares them.
    `backend` is a name, several names separated by commas, or None for automatic choice. An int `seed` replaces
    rng_state.
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
        """Return (out, lse), with gradients if the framework has them; sample the dropout state if it is not given.

        return_lse: gradients flow through lse. want_lse: only the values of lse are needed. With neither, lse may be
            None.
        """

    def forward(self, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> tuple[Any, Any]:
        """Return (out, lse) without recording gradients."""

    def backward(
        self, saved: Saved, inputs: Inputs, options: Options, seed: int | None, backend: str | None
    ) -> Gradients:
        """Return the gradients from the inputs and the results of `forward`."""

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

    def forward_tangent(
        self, tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
    ) -> tuple[Any, Any, Any, Any]:
        """Return (out, lse, tout, tlse): the results of `forward` and `tangent`."""

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
        """Append to the cache in place; return q (rotated) and the number of keys in use per sequence (None: all).

        `check` is called with that number before anything is written. It raises if the attention would raise.
        """

    def check(self, inputs: Inputs, options: Options, backend: str | None) -> None:
        """Raise the errors that `forward` would raise, without computing."""

    def explain(self, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> Explanation:
        """Return the backend that `forward` would use, and why not the others."""

    def warmup(
        self, inputs: Inputs, options: Options, seed: int | None, backend: str | None, *, backward: bool
    ) -> None:
        """Compile the kernels that `forward` and, on request, `backward` need; compute nothing."""

    def scores(self, inputs: Inputs, options: Options, queries: Any, stage: Stage, lse: Any = None) -> Any:
        """Return one stage of the scores of these queries, (batch, nheads, queries, seqlen_k), in q's dtype.

        `inputs.v` is not read. The stage "weights" needs lse. queries: None (all), a slice, or indices.
        """

    def attention_with_functions(
        self,
        inputs: Inputs,
        options: Options,
        functions: ScoreFunctions,
        seed: int | None,
        return_lse: bool,
        backend: str | None,
    ) -> tuple[Any, Any]:
        """Return the results of `attention` with (score_mod, mask_mod)."""

    def with_functions(self, inputs: Inputs, options: Options, score_mod: Any, mask_mod: Any, use: Use) -> Call:
        """Return a call with score_mod and mask_mod, whose parts become built-in arguments as far as `use` allows."""

    def merge(self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
        """Return (out, lse) over the union of two disjoint sets of keys."""


FUNCTIONS = (
    "attention",
    "forward",
    "backward",
    "tangent",
    "forward_tangent",
    "second",
    "append",
    "check",
    "explain",
    "warmup",
    "scores",
    "attention_with_functions",
    "with_functions",
    "merge",
)
