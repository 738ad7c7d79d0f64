"""What would compute a call, and making it ready: nothing here computes."""

from __future__ import annotations

import sys
from typing import Any

from .api import framework_of
from .definition.arguments import Array, explicit
from .runtime import dispatch


def explain(q: Array, k: Array, v: Array, **arguments: Any) -> dispatch.Explanation:
    """Which backend a call (arguments of `attention_forward`) gets, and every refusal. Computes nothing.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> anyattn.explain(x, x, x, causal=True).chosen in anyattn.get_available_backends()
    True
    """
    arrays, options, seed, backend = explicit(q, k, v, **arguments)
    result: dispatch.Explanation = framework_of(q).explain(arrays, options, seed, backend)
    return result


def warmup(q: Array, k: Array, v: Array, *, backward: bool = False, **arguments: Any) -> None:
    """Compiles the kernels of a call (arguments of `attention_forward`) ahead of the first one; computes nothing.

    GPU kernels are compiled once per dtype, head sizes and features, for any lengths, and are kept on disk. backward:
    those of the gradients too. Nothing to do on the CPU.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> anyattn.warmup(x, x, x, causal=True, backward=True)
    """
    arrays, options, seed, backend = explicit(q, k, v, **arguments)
    framework_of(q).warmup(arrays, options, seed, backend, backward=backward)


def get_available_backends() -> list[str]:
    """Names of the backends that run here, best first."""
    return dispatch.available()


def print_backend_info() -> None:
    """Prints the backends and why any of them is not available; `anyattn info` tells more."""
    for name in dispatch.NAMES:
        sys.stdout.write(f"{name}: {dispatch.get(name).available() or 'available'}\n")
