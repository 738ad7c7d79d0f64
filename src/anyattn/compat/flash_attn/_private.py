"""The functions below autograd that ring-flash-attention, long-context-attention and diffusers call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...arguments import make_request
from ...frameworks.torch_tools import dense, dropped_scores, random_state
from ...scalars import integer, real
from .._flash_attn_common.calls import attend, gradients, only_speed, store, window_bounds

Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Scores(NamedTuple):
    """The arguments that every function of flash_attn 2 has, in its order and with its meaning."""

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
            raise RuntimeError(f"softcap does not support dropout, got softcap {softcap} and dropout_p {dropout_p}")
        return {
            "bounds": window_bounds(self.window_size, self.causal),
            "scale": self.softmax_scale,
            "softcap": max(softcap, 0.0),
            "alibi_slopes": self.alibi_slopes,
            "dropout_p": dropout_p,
            "deterministic": self.deterministic,
        }


def forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores, return_softmax: bool, **tables: Any) -> Results:
    """(out, lse with +inf for rows without keys, S_dmask, rng_state); out has gradients."""
    q, arguments = dense("q", q), {**scores.arguments(), **tables}
    drops = arguments["dropout_p"] > 0
    rng_state = random_state(q) if drops else q.new_zeros(2, dtype=torch.int64)
    arguments["rng_state"] = rng_state
    out, lse = attend(q, k, v, **arguments)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if not (return_softmax and drops):
        return out, lse, q.new_empty(0), rng_state
    interval = arguments.pop("bounds")
    return out, lse, dropped_scores(*make_request(q, k, v, interval, **arguments)), rng_state


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
    """(out, softmax_lse, S_dmask, rng_state) of `flash_attn_func`, without gradients.

    rng_state is int64 (seed, offset), for `_flash_attn_backward`; zeros without dropout. RuntimeError if
    return_softmax is asked for without dropout.

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
    """(out, softmax_lse, S_dmask, rng_state) of `flash_attn_varlen_func`, without gradients.

    leftpad_k: (batch,), first key in use; seqused_k: (batch,), keys in use, within cu_seqlens_k. zero_tensors and
    num_splits change no result: rows of no sequence are always 0. RuntimeError for num_splits > 1 with block_table.
    """
    _check_return_softmax(return_softmax, dropout_p)
    only_speed(num_splits, 128)
    if block_table is not None and integer("num_splits", num_splits) > 1:
        raise RuntimeError(f"num_splits > 1 is not supported with block_table, got num_splits {num_splits}")
    tables = varlen_tables(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    tables.update({"leftpad_k": leftpad_k, "seqused_k": seqused_k})
    window = (window_size_left, window_size_right)
    scores = Scores(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    with torch.no_grad():
        return forward(q, k, v, scores, return_softmax, **tables)


def varlen_tables(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: Any, max_seqlen_k: Any, block_table: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of `attention_varlen`; maximal lengths may be tensors."""
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": integer("max_seqlen_q", max_seqlen_q),
        "max_seqlen_k": integer("max_seqlen_k", max_seqlen_k),
        "block_table": block_table,
    }


def _check_return_softmax(return_softmax: bool, dropout_p: float) -> None:
    if return_softmax and not real("dropout_p", dropout_p) > 0:
        raise RuntimeError("return_softmax is only supported when dropout_p > 0")


def _backward(tensors: tuple[Tensor, ...], into: tuple[Tensor | None, ...], arguments: dict[str, Any]) -> Tensor:
    """Writes dq, dk and dv where they are given; returns sum(dout * out) in lse's shape."""
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
    """Writes the gradients into dq, dk and dv (each a buffer or None); returns softmax_d = sum(dout * out).

    out and softmax_lse may be those of a larger set of keys, of which k and v are a part (ring attention). softmax_d
    has softmax_lse's shape. With dropout_p > 0, ValueError without the rng_state of the forward.
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
    """`_flash_attn_backward` for packed sequences. zero_tensors has no effect: rows of no sequence get 0 always."""
    window = (window_size_left, window_size_right)
    scores = Scores(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic)
    tables = varlen_tables(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    arguments = {**scores.arguments(), **tables, "rng_state": rng_state}
    return _backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), arguments)


# Under these names diffusers imports them. Upstream they are the operators of torch.ops.flash_attn.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
