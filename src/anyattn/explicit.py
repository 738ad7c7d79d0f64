"""Attention without autograd: the forward pass, the backward pass, and merging the results over parts of the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arguments import A, check_parts, explicit
from .definition.inputs import Gradients, Saved
from .frameworks import framework_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import ExplicitArguments


def attention_forward(q: A, k: A, v: A, **arguments: Unpack[ExplicitArguments]) -> tuple[A, A]:
    """Compute (out, lse) without recording gradients.

    The backward pass needs the same dropout mask. If dropout_p > 0, pass seed or rng_state to both passes.

    Args:
        q: (batch, seqlen_q, nheads, head_dim), or (total_q, nheads, head_dim) with cu_seqlens_q.
        k: as for `attention` or, with cu_seqlens_k, as for `attention_varlen`.
        v: as for `attention` or, with cu_seqlens_k, as for `attention_varlen`.
        **arguments: keywords of `attention` and `attention_varlen`, except return_lse. For parts of a longer
            sequence, query_start and key_start are added to the indices that dropout counts by, and partial=True gives
            out, and the gradients of the backward pass, in the dtype of lse.

    Returns:
        out and lse, as `attention(..., return_lse=True)` or `attention_varlen(..., return_lse=True)` returns them.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> out, lse = anyattn.attention_forward(x, x, x, causal=True)
    >>> grads = anyattn.attention_backward(np.ones_like(out), x, x, x, out, lse, causal=True)
    >>> grads.dv.shape, grads.dbias is None
    ((1, 4, 2, 8), True)
    """
    inputs, options, seed, backend, functions = explicit(q, k, v, arguments, "attention_forward")
    out, lse = framework_of(q).forward(inputs, options, seed, backend)
    return (out, lse) if functions is None else functions.results(out, lse)


def attention_backward(
    dout: A, q: A, k: A, v: A, out: A, lse: A, *, dlse: A | None = None, **arguments: Unpack[ExplicitArguments]
) -> Gradients:
    """Compute the gradients of sum(out * dout) (+ sum(lse * dlse)).

        dP_ij = D_ij <do_i, v_j>      delta_i = <do_i, o_i> - dlse_i      ds_ij = P_ij (dP_ij - delta_i)
        dq_i = scale sum_j dt_ij k_j  dk_j = scale sum_i dt_ij q_i        dv_j = sum_i P_ij D_ij do_i

    D is the dropout factor, and dt = ds (1 - (t / softcap)^2) under a softcap, else ds. The sums for dk and dv run over
    all queries and heads that use the key. dbias is ds summed over the broadcast axes, and
    dsink_h = - sum_i exp(sink_h - lse_i) delta_i. Keys that no query attends to get 0.

    Args:
        dout: gradient of out, in out's shape.
        q: as passed to `attention_forward`.
        k: as passed to `attention_forward`.
        v: as passed to `attention_forward`.
        out: as returned by `attention_forward`.
        lse: as returned by `attention_forward`.
        dlse: gradient of lse, in lse's shape.
        **arguments: the keywords passed to `attention_forward`.

    Returns:
        Gradients (dq, dk, dv, dbias, dsink, dcaptured). The last three are None without bias, sink, or score_mod
        that reads floating-point arrays.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        UnsupportedProblem: no backend has this backward pass.

    >>> import numpy as np, anyattn
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 6, 2, 8), np.float32)
    >>> out, lse = anyattn.attention_forward(q, k, v)
    >>> grads = anyattn.attention_backward(dout, q, k, v, out, lse)
    >>> bool(np.allclose((grads.dv * v).sum(), (dout * out).sum(), atol=1e-4))  # out is linear in v
    True
    """
    inputs, options, seed, backend, functions = explicit(q, k, v, arguments, "attention_backward")
    saved = Saved(out, lse, dout, dlse)
    if functions is None:
        return framework_of(q).backward(saved, inputs, options, seed, backend)
    return functions.gradients(framework_of(q).backward(functions.saved(saved), inputs, options, seed, backend))


def merge(out_a: A, lse_a: A, out_b: A, lse_b: A) -> tuple[A, A]:
    """Merge the results of attention over two disjoint sets of keys into the exact result over their union.

        lse = log(exp(lse_a) + exp(lse_b))      out = out_a + (out_b - out_a) exp(lse_b - lse)

    Queries without visible keys in either set give out 0 and lse -inf.

    Args:
        out_a: (..., seqlen, nheads, head_dim_v), result over the first set.
        lse_a: (..., nheads, seqlen).
        out_b: result over the second set, in out_a's shape.
        lse_b: in lse_a's shape.

    Returns:
        out and lse over the union, in the shapes of out_a and lse_a.

    >>> import numpy as np, anyattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> halves = [anyattn.attention(x, x[:, s], x[:, s], return_lse=True) for s in (slice(0, 2), slice(2, 4))]
    >>> bool(np.allclose(anyattn.merge(*halves[0], *halves[1])[0], anyattn.attention(x, x, x)))
    True
    """
    check_parts(out_a, lse_a, out_b, lse_b)
    return framework_of(out_a, "out_a").merge(out_a, lse_a, out_b, lse_b)
