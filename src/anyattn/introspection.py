"""What would compute a call, and making it ready: nothing here computes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .arguments import A, explicit
from .frameworks import framework_of
from .runtime import dispatch

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import ExplicitArguments


def explain(q: A, k: A, v: A, **arguments: Unpack[ExplicitArguments]) -> dispatch.Explanation:
    """Which backend a call (arguments of `attention_forward`) gets, and every refusal. Computes nothing.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> anyattn.explain(x, x, x, causal=True).chosen in anyattn.get_available_backends()
    True
    """
    inputs, options, seed, backend = explicit(q, k, v, arguments, "explain")
    return framework_of(q).explain(inputs, options, seed, backend)


def warmup(q: A, k: A, v: A, *, backward: bool = False, **arguments: Unpack[ExplicitArguments]) -> None:
    """Compiles the kernels of a call (arguments of `attention_forward`) ahead of the first one; computes nothing.

    GPU kernels are compiled once per dtype, head sizes and features, for any lengths, and are kept on disk. backward:
    those of the gradients too. Nothing to do on the CPU.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> anyattn.warmup(x, x, x, causal=True, backward=True)
    """
    inputs, options, seed, backend = explicit(q, k, v, arguments, "warmup")
    framework_of(q).warmup(inputs, options, seed, backend, backward=backward)


def get_available_backends() -> list[str]:
    """Names of the backends that run here, best first."""
    return dispatch.available()


def print_backend_info() -> None:
    """Prints the backends and why any of them is not available; `anyattn info` tells more."""
    for name in dispatch.names():
        sys.stdout.write(f"{name}: {dispatch.get(name).available() or 'available'}\n")
