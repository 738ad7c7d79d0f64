"""Functions below autograd, which ring-flash-attention, long-context-attention and diffusers call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...arguments import make_request
from ...frameworks.torch_tools import dense, dropped_scores, random_state
from ...scalars import integer, real
from .._flash_attn_common.calls import attend, check_num_splits, gradients, store, window_bounds

Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Scores(NamedTuple):
    """Arguments that every function of flash_attn 2 has, in its order."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Any
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `attend`."""
        softcap, dropout_p = real("softcap", self.softcap), real("dropout_p", self.dropout_p)
        if dropout_p > 0 and softcap > 0:
            raise RuntimeError(f"softcap must be 0 with dropout, got softcap {softcap} and dropout_p {dropout_p}.")
        return {
            "bounds": window_bounds(self.window_size, self.causal),
            "scale": self.softmax_scale,
            "softcap": max(softcap, 0.0),
            "alibi_slopes": self.alibi_slopes,
            "dropout_p": dropout_p,
            "deterministic": self.deterministic,
        }


def forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores, return_softmax: bool, **tables: Any) -> Results:
    """Return (out, lse with +inf for queries without visible keys, S_dmask, rng_state). out has gradients."""
    q, arguments = dense("q", q), {**scores.arguments(), **tables}
    drops = arguments["dropout_p"] > 0
    rng_state = random_state(q) if drops else q.new_zeros(2, dtype=torch.int64)
    arguments["rng_state"] = rng_state
    out, lse = attend(q, k, v, **arguments)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if not (return_softmax and drops):
        return out, lse, q.new_empty(0), rng_state
    interval = arguments.pop("bounds")
    request = make_request(q, k, v, interval, **arguments)
    dropped = dropped_scores(request.inputs, request.options, request.seed, request.backend)
    return out, lse, dropped, rng_state


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (out, softmax_lse, S_dmask, rng_state) of `flash_attn_func` without gradients.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_kv, head_dim).
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size_left: keys before the position of a query that it attends to; -1: unbounded.
        window_size_right: keys after the position of a query that it attends to; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        return_softmax: also compute S_dmask; needs dropout_p > 0.

    Returns:
        out, softmax_lse, S_dmask and rng_state. rng_state is int64 (seed, offset) for `_flash_attn_backward`, zeros
        without dropout.

    Raises:
        RuntimeError: return_softmax without dropout.

    >>> import torch
    >>> from anyattn.compat.flash_attn.flash_attn_interface import _flash_attn_forward
    >>> q = torch.ones(1, 4, 2, 8)
    >>> out, lse, _, _ = _flash_attn_forward(q, q, q, 0.0, 8**-0.5, True, -1, -1, 0.0, None, False)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 2, 8]), torch.Size([1, 2, 4]))
    """
    _check_return_softmax(return_softmax, dropout_p)
    window = (window_size_left, window_size_right)
    scores = Scores(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    with torch.no_grad():
        return forward(q, k, v, scores, return_softmax)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (out, softmax_lse, S_dmask, rng_state) of `flash_attn_varlen_func` without gradients.

    Args:
        q: (total_q, nheads, head_dim).
        k: (total_k, nheads_kv, head_dim); with block_table, pages (num_pages, page_size, nheads_kv, head_dim).
        v: like k, with head_dim_v.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k: int32 (batch + 1,), cumulative lengths of the key sequences.
        max_seqlen_q: at least the longest query length; a smaller value raises ValueError.
        max_seqlen_k: at least the longest key length; a smaller value raises ValueError.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size_left: keys before the position of a query that it attends to; -1: unbounded.
        window_size_right: keys after the position of a query that it attends to; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        return_softmax: also compute S_dmask; needs dropout_p > 0.
        block_table: int32 (batch, max_pages), pages of each sequence, of any size.
        leftpad_k: (batch,), first key in use.
        seqused_k: (batch,), number of keys in use, within cu_seqlens_k.
        zero_tensors: no effect, because rows outside every sequence are always 0.
        num_splits: 0 to 128, a hint for GPUs; at most 1 with block_table.

    Raises:
        RuntimeError: return_softmax without dropout, or num_splits > 1 with block_table.
    """
    _check_return_softmax(return_softmax, dropout_p)
    check_num_splits(num_splits, 128)
    if block_table is not None and integer("num_splits", num_splits) > 1:
        raise RuntimeError(f"num_splits must be 0 or 1 with block_table, got {num_splits}.")
    tables = varlen_tables(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    tables.update({"leftpad_k": leftpad_k, "seqused_k": seqused_k})
    window = (window_size_left, window_size_right)
    scores = Scores(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    with torch.no_grad():
        return forward(q, k, v, scores, return_softmax, **tables)


def varlen_tables(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: Any, max_seqlen_k: Any, block_table: Tensor | None = None
) -> dict[str, Any]:
    """Return arguments of `attention_varlen`. Maximum lengths may be tensors."""
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": integer("max_seqlen_q", max_seqlen_q),
        "max_seqlen_k": integer("max_seqlen_k", max_seqlen_k),
        "block_table": block_table,
    }


def _check_return_softmax(return_softmax: bool, dropout_p: float) -> None:
    if return_softmax and not real("dropout_p", dropout_p) > 0:
        raise RuntimeError("return_softmax must be False if dropout_p is 0, got True.")


def _backward(tensors: tuple[Tensor, ...], into: tuple[Tensor | None, ...], arguments: dict[str, Any]) -> Tensor:
    """Write dq, dk and dv to the buffers that are not None; return sum(dout * out) in lse's shape."""
    dout, _, _, _, out, _ = tensors
    for buffer, gradient in zip(into, gradients(*tensors, **arguments)[:3], strict=True):
        store(buffer, gradient)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Compute the gradients of `flash_attn_func` and write them to dq, dk and dv.

    out and softmax_lse may belong to a larger set of keys that contains k and v (ring attention).

    Args:
        dout: gradient of out.
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_kv, head_dim).
        v: (batch, seqlen_k, nheads_kv, head_dim_v).
        out: result of the forward pass.
        softmax_lse: of the forward pass, +inf or -inf for queries without visible keys.
        dq: buffer for the gradient of q, or None.
        dk: buffer for the gradient of k, or None.
        dv: buffer for the gradient of v, or None.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size_left: keys before the position of a query that it attends to; -1: unbounded.
        window_size_right: keys after the position of a query that it attends to; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        rng_state: of the forward pass; needed for dropout_p > 0.

    Returns:
        softmax_d = sum(dout * out), in softmax_lse's shape.

    Raises:
        ValueError: dropout_p > 0 without rng_state.
    """
    window = (window_size_left, window_size_right)
    scores = Scores(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic)
    arguments = {**scores.arguments(), "rng_state": rng_state}
    return _backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), arguments)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Compute the gradients of `flash_attn_varlen_func` and write them to dq, dk and dv.

    Args:
        dout: gradient of out.
        q: (total_q, nheads, head_dim).
        k: (total_k, nheads_kv, head_dim).
        v: like k, with head_dim_v.
        out: result of the forward pass.
        softmax_lse: of the forward pass, +inf or -inf for queries without visible keys.
        dq: buffer for the gradient of q, or None.
        dk: buffer for the gradient of k, or None.
        dv: buffer for the gradient of v, or None.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k: int32 (batch + 1,), cumulative lengths of the key sequences.
        max_seqlen_q: at least the longest query length; a smaller value raises ValueError.
        max_seqlen_k: at least the longest key length; a smaller value raises ValueError.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size_left: keys before the position of a query that it attends to; -1: unbounded.
        window_size_right: keys after the position of a query that it attends to; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        rng_state: of the forward pass; needed for dropout_p > 0.
        zero_tensors: no effect, because rows outside every sequence are always 0.

    Returns:
        softmax_d = sum(dout * out), in softmax_lse's shape.

    Raises:
        ValueError: dropout_p > 0 without rng_state.
    """
    window = (window_size_left, window_size_right)
    scores = Scores(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic)
    tables = varlen_tables(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    arguments = {**scores.arguments(), **tables, "rng_state": rng_state}
    return _backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), arguments)


# diffusers imports these names. Upstream they are the operators of torch.ops.flash_attn.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
