"""Kernels for torch's own attention operators, for torch.nn.attention's registry of flash implementations.

Code compiled by Inductor relies on the strides of torch's fake kernels. out is laid out like query. logsumexp is stored
as (batch, seqlen_q, nheads), and gradients as (batch, seqlen, nheads, head_dim). On a GPU, logsumexp is contiguous and
gradients are laid out like the inputs. The operators of packed sequences, used by torch.nn.attention.varlen, have no
CPU kernel in torch.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...definition.inputs import NO_EXTRAS, Extras, Inputs, Saved
from ...definition.options import Options
from ...runtime import execute
from . import functional, jagged, ops
from .adapter import adapter

# torch 2.6 has `philox_seed` and `philox_offset` where later ones have `rng_state` and `unused`.
_TWO_STATES = "philox_seed" in str(torch.ops.aten._flash_attention_forward.default._schema)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute aten::_scaled_dot_product_flash_attention_for_cpu: (output, logsumexp)."""
    inputs, options = _call(query, key, value, dropout_p, is_causal, attn_mask, scale)
    result, lse = execute.forward(adapter, inputs, options, None)
    return _laid_out(result.transpose(1, 2), query), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _laid_out(result: Tensor, query: Tensor) -> Tensor:
    if result.shape != query.shape:  # copy_ would broadcast a value of head_dim 1
        raise ValueError(
            f"query and value must have the same head_dim, as in torch, got results {tuple(result.shape)}."
        )
    out = torch.empty_like(query)
    return result if out.stride() == result.stride() else out.copy_(result)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten::_scaled_dot_product_flash_attention_for_cpu_backward: (grad_query, grad_key, grad_value)."""
    inputs, options = _call(query, key, value, dropout_p, is_causal, attn_mask, scale)
    saved = ops.contiguous_saved(Saved(out.transpose(1, 2), logsumexp, grad_out.transpose(1, 2)))
    grads = execute.backward(adapter, saved, inputs, options, None, absent=("dbias",))
    return grads.dq.transpose(1, 2), grads.dk.transpose(1, 2), grads.dv.transpose(1, 2)


def gpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Compute aten::_scaled_dot_product_flash_attention.

    It returns (output, logsumexp, -, -, max_q, max_k, rng_state, unused, unused). is_causal is aligned to the bottom
    right, because torch uses it for as many queries as keys and for CausalBias.
    """
    _without_scores(return_debug_mask)
    inputs, options = _call(query, key, value, dropout_p, is_causal, None, scale, "bottom-right")
    inputs, state = _with_dropout(inputs, dropout_p)
    out, lse = execute.forward(adapter, inputs, options, None)
    sizes = (query.shape[2], key.shape[2])
    return _laid_out(out.transpose(1, 2), query), lse, None, None, *sizes, *state, query.new_empty(0)


def gpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Compute aten::_scaled_dot_product_flash_attention_backward: (grad_query, grad_key, grad_value)."""
    inputs, options = _call(query, key, value, dropout_p, is_causal, None, scale, "bottom-right")
    inputs, _ = _with_dropout(inputs, dropout_p, rng_state, unused)
    saved = ops.contiguous_saved(Saved(out.transpose(1, 2), logsumexp, grad_out.transpose(1, 2)))
    grads = execute.backward(adapter, saved, inputs, options, None)
    return tuple(_laid_out(grad.transpose(1, 2), x) for grad, x in zip(grads, (query, key, value), strict=False))


def _without_scores(return_debug_mask: bool) -> None:
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask must be False, got True. anyattn does not store scores.")


def _with_dropout(inputs: Inputs, p: float, *carried: Tensor) -> tuple[Inputs, tuple[Tensor, ...]]:
    """Return the inputs with the Philox state, and that state as the two tensors in which torch passes it on."""
    if not p:
        return inputs, _carry(torch.zeros(2, dtype=torch.int64, device=inputs.q.device))
    if not carried:
        state = functional.random_state(inputs.q)
    else:
        state = torch.stack(carried) if _TWO_STATES else carried[0].view(torch.int64)
    return inputs._replace(extras=inputs.extras._replace(rng_state=state)), _carry(state)


def _carry(state: Tensor) -> tuple[Tensor, ...]:
    """Return the state as two int64 tensors (), or as a uint64 tensor (2,) and an unused tensor."""
    if _TWO_STATES:
        return state[0].clone(), state[1].clone()
    return state.view(torch.uint64), torch.empty(0, device=state.device)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
    alignment: str = "top-left",
) -> tuple[Inputs, Options]:
    if attn_mask is not None:  # torch has already made it additive
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        wide = ops.compute_dtype(query)
        attn_mask = attn_mask if attn_mask.dtype in (query.dtype, wide) else attn_mask.to(wide)
    options = Options(scale=scale, right=0 if is_causal else None, alignment=alignment, dropout_p=dropout_p)
    extras = NO_EXTRAS if attn_mask is None else Extras(bias=attn_mask)
    inputs = Inputs(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), extras)
    return ops.contiguous_inputs(inputs), options


def packed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute aten::_flash_attention_forward: (output, softmax_logsumexp, rng_state, unused, debug_attn_mask)."""
    _without_scores(return_debug_mask)
    if block_table is not None and cum_seq_k is not None:  # cum_seq_k only gives lengths
        seqused_k = cum_seq_k.diff() if seqused_k is None else seqused_k
        cum_seq_k = None
    extras = Extras(
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )
    options = _packed_options(dropout_p, is_causal, scale, window_size_left, window_size_right)
    options = options._replace(max_seqlen_q=max_q, max_seqlen_k=max_k, batch_invariant=num_splits == 1)
    inputs = ops.contiguous_inputs(Inputs(query, key, value, extras))
    inputs, state = _with_dropout(inputs, dropout_p)
    out, lse = execute.forward(adapter, inputs, options, None)
    return _laid_out(out, query), lse, *state, query.new_empty(0)


def packed_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute aten::_flash_attention_backward: (grad_query, grad_key, grad_value)."""
    options = _packed_options(dropout_p, is_causal, scale, window_size_left, window_size_right)
    options = options._replace(max_seqlen_q=max_q, max_seqlen_k=max_k)
    inputs = Inputs(query, key, value, Extras(cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k))
    inputs, _ = _with_dropout(ops.contiguous_inputs(inputs), dropout_p, rng_state, unused)
    saved = ops.contiguous_saved(Saved(out, logsumexp, grad_out))
    grads = execute.backward(adapter, saved, inputs, options, None)
    return tuple(_laid_out(grad, x) for grad, x in zip(grads, (query, key, value), strict=False))


def _packed_options(
    dropout_p: float, is_causal: bool, scale: float | None, left: int | None, right: int | None
) -> Options:
    left, right = (None if side is None or side < 0 else side for side in (left, right))
    return Options(scale=scale, left=left, right=0 if is_causal else right, dropout_p=dropout_p)


_PACKED = {"_flash_attention_forward": packed_forward, "_flash_attention_backward": packed_backward}
KERNELS: dict[str, dict[str, Any]] = {  # by dispatch key
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": backward,
        **_PACKED,
    },
    "CUDA": {
        "_scaled_dot_product_flash_attention": gpu_forward,
        "_scaled_dot_product_flash_attention_backward": gpu_backward,
        **_PACKED,
    },
}


class Override:
    """Replacement of torch's kernels by anyattn's, until `remove`.

    Meanwhile nn.MultiheadAttention does not take its inference fast path, because that path computes attention without
    these kernels.
    """

    def __init__(self) -> None:
        self.library: Any = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch warns that a kernel is overridden, which the caller asked for
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for device, kernels in KERNELS.items():
                for name, kernel in kernels.items():
                    self.library.impl(name, kernel, device)
        self.jagged = jagged.Hook()
        self.fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None
            self.jagged.remove()
            torch.backends.mha.set_fastpath_enabled(self.fastpath)
