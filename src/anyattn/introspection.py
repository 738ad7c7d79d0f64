"""Inspect and pre-compile calls (`explain`, `warmup`) without running them, and list the backends."""

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
    """Explain which backend a call uses and why each other backend is refused. Nothing is computed.

    Args:
        q: (batch, seqlen_q, nheads, head_dim), or (total_q, nheads, head_dim) with cu_seqlens_q.
        k: as for `attention` or `attention_varlen`.
        v: as for `attention` or `attention_varlen`.
        **arguments: keywords of `attention_forward`.

    Returns:
        Explanation (problem, chosen, reasons): a description of the call, the name of the backend (None: no backend
        computes the call), and for each backend the reasons against it. Printing it shows all three.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> anyattn.explain(x, x, x, causal=True).chosen in anyattn.get_available_backends()
    True
    """
    inputs, options, seed, backend, _ = explicit(q, k, v, arguments, "explain")
    return framework_of(q).explain(inputs, options, seed, backend)


def warmup(q: A, k: A, v: A, *, backward: bool = False, **arguments: Unpack[ExplicitArguments]) -> None:
    """Compile the kernels of a call before its first use. Nothing is computed.

    GPU kernels are compiled once per dtype, head size and set of features, for any lengths, and are stored on disk.
    The CPU and NumPy backends have nothing to compile.

    Args:
        q: (batch, seqlen_q, nheads, head_dim), or (total_q, nheads, head_dim) with cu_seqlens_q.
        k: as for `attention` or `attention_varlen`.
        v: as for `attention` or `attention_varlen`.
        backward: also compile the kernels of the gradients.
        **arguments: keywords of `attention_forward`.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> anyattn.warmup(x, x, x, causal=True, backward=True)
    """
    inputs, options, seed, backend, _ = explicit(q, k, v, arguments, "warmup")
    framework_of(q).warmup(inputs, options, seed, backend, backward=backward)


def get_available_backends() -> list[str]:
    """Return the names of the backends that run on this machine, best first."""
    return dispatch.available()


def print_backend_info() -> None:
    """Print each backend and, if it is not available, the reason. `anyattn info` prints more details."""
    for name in dispatch.names():
        sys.stdout.write(f"{name}: {dispatch.get(name).available() or 'available'}\n")
