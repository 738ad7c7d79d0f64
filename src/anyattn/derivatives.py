"""Derivatives along tangents as explicit functions: for NumPy arrays, and for code with its own differentiation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arguments import A, explicit
from .definition.inputs import Saved, SecondGradients, Tangents
from .frameworks import framework_of
from .frameworks.score_arguments import DESCRIPTION

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import ExplicitArguments


def attention_tangent(
    q: A,
    k: A,
    v: A,
    out: A,
    lse: A,
    *,
    tq: A | None = None,
    tk: A | None = None,
    tv: A | None = None,
    tbias: A | None = None,
    tsink: A | None = None,
    **arguments: Unpack[ExplicitArguments],
) -> tuple[A, A]:
    """Compute the derivative of (out, lse) along tangents of the inputs (forward mode), in O(N) memory.

        u_ij = f'_ij scale (<tq_i, k_j> + <q_i, tk_j>) + tbias_ij       tlse_i = sum_j P_ij u_ij + P_sink tsink
        tout_i = sum_j P_ij D_ij (u_ij v_j + tv_j) - tlse_i out_i

    f' is the derivative of softcap and score_mod, 1 without both. D are the dropout factors. Queries without keys get
    tout = 0. Arrays that score_mod reads are constants.

    Args:
        q: as passed to `attention_forward`.
        k: as passed to `attention_forward`.
        v: as passed to `attention_forward`.
        out: as returned by `attention_forward`.
        lse: as returned by `attention_forward`.
        tq: tangent of q, in q's shape and dtype. None stands for zeros, and its products are skipped.
        tk: tangent of k, like tq.
        tv: tangent of v, like tq.
        tbias: tangent of bias, like tq.
        tsink: tangent of sink, like tq. Masks, slopes and tables have no tangents.
        **arguments: the keywords passed to `attention_forward`.

    Returns:
        (tout, tlse): in the shapes and dtypes of out and lse.

    Raises:
        ValueError, TypeError: an array has the wrong shape or dtype; the message names it.
        UnsupportedProblem: no backend computes this call; the message lists the reasons.

    >>> import numpy as np, anyattn
    >>> q, k, v, tv = np.random.default_rng(0).standard_normal((4, 1, 6, 2, 8), dtype=np.float32)
    >>> out, lse = anyattn.attention_forward(q, k, v, causal=True)
    >>> tout, tlse = anyattn.attention_tangent(q, k, v, out, lse, tv=tv, causal=True)
    >>> bool(np.allclose(tout, anyattn.attention(q, k, tv, causal=True), atol=1e-6))  # out is linear in v
    True
    """
    inputs, options, seed, backend, _ = explicit(q, k, v, arguments, "attention_tangent", DESCRIPTION)
    tangents = Tangents(tq, tk, tv, tbias, tsink)
    return framework_of(q).tangent(out, lse, tangents, inputs, options, seed, backend)


def attention_forward_tangent(
    q: A,
    k: A,
    v: A,
    *,
    tq: A | None = None,
    tk: A | None = None,
    tv: A | None = None,
    tbias: A | None = None,
    tsink: A | None = None,
    **arguments: Unpack[ExplicitArguments],
) -> tuple[A, A, A, A]:
    """Compute (out, lse) and their derivative along tangents of the inputs, in O(N) memory.

    The results are those of `attention_forward` and `attention_tangent`. The CPU engine computes them in one sweep over
    the keys, which takes less time than the two calls.

    Args:
        q: as in `attention_forward`.
        k: as in `attention_forward`.
        v: as in `attention_forward`.
        tq: tangent of q, in q's shape and dtype. None stands for zeros, and its products are skipped.
        tk: tangent of k, like tq.
        tv: tangent of v, like tq.
        tbias: tangent of bias, like tq.
        tsink: tangent of sink, like tq.
        **arguments: the keywords of `attention_forward`.

    Returns:
        (out, lse, tout, tlse): (out, lse) as `attention_forward` returns them; (tout, tlse) in their shapes and dtypes.

    Raises:
        ValueError, TypeError, UnsupportedProblem: as in `attention_tangent`.

    >>> import numpy as np, anyattn
    >>> q, k, v, tq = np.random.default_rng(0).standard_normal((4, 1, 6, 2, 8), dtype=np.float32)
    >>> out, lse, tout, tlse = anyattn.attention_forward_tangent(q, k, v, tq=tq)
    >>> bool(np.allclose(tout, anyattn.attention_tangent(q, k, v, out, lse, tq=tq)[0], atol=1e-6))
    True
    """
    inputs, options, seed, backend, _ = explicit(q, k, v, arguments, "attention_forward_tangent", DESCRIPTION)
    tangents = Tangents(tq, tk, tv, tbias, tsink)
    return framework_of(q).forward_tangent(tangents, inputs, options, seed, backend)


def attention_second(
    dout: A,
    q: A,
    k: A,
    v: A,
    out: A,
    lse: A,
    *,
    dlse: A | None = None,
    tq: A | None = None,
    tk: A | None = None,
    tv: A | None = None,
    tbias: A | None = None,
    tsink: A | None = None,
    **arguments: Unpack[ExplicitArguments],
) -> SecondGradients:
    """Compute the gradients of <dout, tout> + <dlse, tlse>, where (tout, tlse) is the tangent: second derivatives.

    Second derivatives are symmetric, so the result has three readings. It is the gradient of `attention_tangent`'s
    results. It is the derivative of `attention_backward`'s gradients along the tangents. And it is the backward of
    `attention_backward`, where (tq, tk, tv, tbias, tsink) are the incoming gradients of (dq, dk, dv, dbias, dsink).

    Args:
        dout: gradient of out passed to `attention_backward`, or the incoming gradient of tout.
        q: as passed to `attention_forward`.
        k: as passed to `attention_forward`.
        v: as passed to `attention_forward`.
        out: as returned by `attention_forward`.
        lse: as returned by `attention_forward`.
        dlse: gradient of lse passed to `attention_backward`, or the incoming gradient of tlse.
        tq: direction along q, in q's shape and dtype; None stands for zeros.
        tk: direction along k, like tq.
        tv: direction along v, like tq.
        tbias: direction along bias, like tq.
        tsink: direction along sink, like tq.
        **arguments: the keywords passed to `attention_forward`.

    Returns:
        SecondGradients: dq, dk, dv, dbias, dsink, dcaptured (of the arrays that score_mod reads, flat), and ddout and
            ddlse, the gradients of dout and dlse, which equal tout and tlse.

    Raises:
        ValueError, TypeError, UnsupportedProblem: as in `attention_tangent`.

    >>> import numpy as np, anyattn
    >>> q, k, v, dout, tq = np.random.default_rng(0).standard_normal((5, 1, 6, 2, 8))
    >>> def gradient(q):
    ...     return anyattn.attention_backward(dout, q, k, v, *anyattn.attention_forward(q, k, v)).dq
    >>> out, lse = anyattn.attention_forward(q, k, v)
    >>> found = anyattn.attention_second(dout, q, k, v, out, lse, tq=tq)
    >>> difference = (gradient(q + 1e-5 * tq) - gradient(q - 1e-5 * tq)) / 2e-5
    >>> bool(np.allclose(found.dq, difference, atol=1e-8))
    True
    """
    inputs, options, seed, backend, _ = explicit(q, k, v, arguments, "attention_second", DESCRIPTION)
    tangents = Tangents(tq, tk, tv, tbias, tsink)
    return framework_of(q).second(Saved(out, lse, dout, dlse), tangents, inputs, options, seed, backend)
