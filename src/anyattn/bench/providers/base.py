"""Protocol of a provider, and helpers that several providers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..inputs import Inputs
from ..workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor

LIMIT_BYTES = 3 * 2**30  # limit of one array of masks or scores


class Refused(Exception):
    """Reason why a provider cannot compute a workload."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Prepared call: `run` is timed; `results` converts its result to out, or dq, dk and dv, in the inputs' layouts."""

    run: Callable[[], Any]
    results: Callable[[Any], list[Tensor]]
    own_dropout: bool = False


class Provider(Protocol):
    """Implementation of attention."""

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str:
        """Return the package that has to be installed."""

    def absent(self) -> str | None:
        """Return why the provider cannot be used on this machine, or None."""

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        """Return the prepared call; None if the variant does not apply. Raises Refused if it cannot be computed."""


def refuse(workload: Workload, **features: Any) -> None:
    """Raise for the first of these features that the workload has (name -> whether the workload has it, or True)."""
    for reason, present in features.items():
        if present:
            raise Refused(f"no {reason.replace('_', ' ')}")


def installed(*packages: str) -> str | None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def per_sequence(inputs: Inputs, prepare: Callable[[Inputs], Prepared]) -> Prepared:
    """Prepare a packed workload as a loop over its sequences."""
    import torch

    prepared = [prepare(part) for part in inputs.parts]

    def results(returned: list[Any]) -> list[Tensor]:
        each = [one.results(value) for one, value in zip(prepared, returned, strict=True)]
        return [torch.cat([x[0] for x in arrays]) for arrays in zip(*each, strict=True)]

    return Prepared(lambda: [one.run() for one in prepared], results)


def differentiate(arrays: list[Tensor], attend: Callable[..., Tensor], dout: Tensor) -> Callable[[], Any]:
    """Return a function that computes the gradients of the arrays from a saved forward pass."""
    import torch

    leaves = [x.detach().requires_grad_() for x in arrays]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def swapped(arrays: Any) -> list[Tensor]:
    """Swap axes 1 and 2: (batch, nheads, seqlen, head_dim) <-> (batch, seqlen, nheads, head_dim)."""
    return [x.transpose(1, 2) for x in arrays]
