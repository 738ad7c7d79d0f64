"""What a provider is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..inputs import Inputs
from ..workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor

LIMIT_BYTES = 3 * 2**30  # of one array of masks or scores


class Refused(Exception):
    """Why a provider cannot compute a workload."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """`run` is timed; `results` makes out, or dq, dk and dv, of what it returned, in the layouts of the inputs."""

    run: Callable[[], Any]
    results: Callable[[Any], list[Tensor]]
    own_dropout: bool = False


class Provider(Protocol):
    """One implementation of attention."""

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str:
        """What has to be installed."""

    def absent(self) -> str | None:
        """None, or why it cannot be used here."""

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        """None where this variant does not arise; what cannot be computed raises Refused."""


def refuse(workload: Workload, **features: Any) -> None:
    """Raises for the first of these features (name -> whether the workload has it, or True) that is there."""
    for reason, present in features.items():
        if present:
            raise Refused(f"no {reason.replace('_', ' ')}")


def installed(*packages: str) -> str | None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def per_sequence(inputs: Inputs, prepare: Callable[[Inputs], Prepared]) -> Prepared:
    """A packed workload as a loop over its sequences."""
    import torch

    prepared = [prepare(part) for part in inputs.parts]

    def results(returned: list[Any]) -> list[Tensor]:
        each = [one.results(value) for one, value in zip(prepared, returned, strict=True)]
        return [torch.cat([x[0] for x in arrays]) for arrays in zip(*each, strict=True)]

    return Prepared(lambda: [one.run() for one in prepared], results)


def differentiate(arrays: list[Tensor], attend: Callable[..., Tensor], dout: Tensor) -> Callable[[], Any]:
    """The backward of a saved forward: a function that returns the gradients of the arrays."""
    import torch

    leaves = [x.detach().requires_grad_() for x in arrays]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def swapped(arrays: Any) -> list[Tensor]:
    """(batch, nheads, seqlen, head_dim) <-> (batch, seqlen, nheads, head_dim)"""
    return [x.transpose(1, 2) for x in arrays]
