"""Implementation of flash_attn 4's functions, and `_flash_attn_fwd` and `_flash_attn_bwd`, which torch imports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...scalars import flag, integer, real
from .._flash_attn_common.calls import Bounds, check_num_splits, gradients, pair, store
from .._flash_attn_common.inputs import Descales, attend_extended
from ._gather import key_lists
from .block_sparsity import sparse_mask

Result = tuple[Tensor, "Tensor | None"]

_CUTE = (
    "its functions are written in a GPU language. Pass Python functions, `bias` or `mask` to anyattn.attention instead"
)
_REASONS = {
    "score_mod": _CUTE,
    "score_mod_bwd": _CUTE,
    "mask_mod": _CUTE,
    "aux_tensors": "it belongs to score_mod and mask_mod, which are not supported",
    "aux_scalars": "it belongs to score_mod and mask_mod, which are not supported",
}


def refuse(**given: Any) -> None:
    """Raise for the first argument that is not None."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported: {_REASONS[name]}.")


def check_gather(indices: Any, recompute_p: Any, token_chunk: Any) -> None:
    """Raise, as upstream, if arguments for gathered keys are passed without keys. They are only hints for GPUs."""
    if indices is None and (flag("gather_bwd_recompute_p", recompute_p) or token_chunk is not None):
        raise ValueError("gather_bwd_recompute_p and gather_bwd_token_chunk only apply to gather_kv_indices, got none.")


def window_bounds(window_size: Any, causal: Any) -> Bounds:
    """Return (left, right) of flash_attn 4."""
    sides = pair("window_size", window_size)
    left, right = (None if side is None else integer("window_size", side) for side in sides)
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    return left, 0 if flag("causal", causal) else right


def attend_4(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    qv: Tensor | None,
    causal: bool,
    window_size: Any,
    return_lse: bool,
    *,
    descales: Descales = (None, None, None),
    softcap: float | None = 0.0,
    gather_kv_indices: Tensor | None = None,
    **arguments: Any,
) -> Result:
    """Return (out, lse or None), with autograd."""
    if q is None or k is None:  # scores are qv v^T
        if qv is None or not q is k is None:
            raise TypeError("q and k must both be tensors, or both None together with qv.")
        q, k, qv = qv, v, None
    if gather_kv_indices is not None:
        cu_seqlens_q, cu_seqlens_k = arguments.get("cu_seqlens_q"), arguments.get("cu_seqlens_k")
        pages = arguments.get("block_table")
        arguments["kv_indices"] = key_lists(gather_kv_indices, q, k, cu_seqlens_q, cu_seqlens_k, pages)
    bounds = window_bounds(window_size, causal)
    softcap = 0.0 if softcap is None else real("softcap", softcap)
    arguments.update({"bounds": bounds, "softcap": softcap, "return_lse": return_lse})
    out, lse = attend_extended(q, k, v, qv=qv, descales=descales, **arguments)
    inputs = (q, k, v, qv, arguments.get("sink"))
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not (return_lse or recorded):
        return out, None
    return out, lse if qv is None else lse.transpose(-1, -2)


def _flash_attn_fwd(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    tile_mn: Any = None,
    mma_pv_is_rs: bool | None = None,
    intra_wg_overlap: bool | None = None,
    num_threads: int = 384,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    _arch: int | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
) -> Result:
    """Compute (out, lse) without gradients, the results that torch uses. out and lse may be buffers to write to.

    The arguments from tile_mn to _arch, and scheduler_metadata and the three after it, are hints for GPUs and do not
    affect results. `interface.flash_attn_varlen_func` describes the others.
    """
    refuse(
        score_mod=score_mod,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
    )
    check_num_splits(num_splits, 256)
    arguments: dict[str, Any] = {"scale": softmax_scale, "softcap": softcap, "sink": learnable_sink}
    arguments.update({"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "block_table": page_table})
    arguments.update({"seqused_q": seqused_q, "seqused_k": seqused_k, "descales": (q_descale, k_descale, v_descale)})
    arguments.update({"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k})
    arguments["gather_kv_indices"] = gather_kv_indices
    arguments["mask"] = sparse_mask(block_sparse_tensors, q, k, (qv, cu_seqlens_q, cu_seqlens_k), page_table)
    window = (window_size_left, window_size_right)
    with torch.no_grad():
        value, row_lse = attend_4(q, k, v, qv, causal, window, return_lse or lse is not None, **arguments)
        return store(out, value), None if row_lse is None else store(lse, row_lse)


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    n_block_size: int = 128,
    num_threads: int = 256,
    pack_gqa: bool = False,
    num_stages_Q: int = 2,
    num_stages_dO: int = 2,
    SdP_swapAB: bool = False,
    dKV_swapAB: bool = False,
    dQ_swapAB: bool = False,
    AtomLayoutMSdP: int = 2,
    AtomLayoutNdKV: int = 2,
    AtomLayoutMdQ: int = 2,
    V_in_regs: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    dlse: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute (dq, dk, dv), and dsink with a learnable_sink. dq, dk and dv may be buffers to write to.

    The arguments from m_block_size to V_in_regs are hints for GPUs and do not affect results. dlse is the gradient of
    lse. block_sparse_tensors lists, for each block of keys, the blocks of queries.
    """
    refuse(
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
    )
    mask = sparse_mask(block_sparse_tensors, q, k, (cu_seqlens_q, cu_seqlens_k), by_keys=True)
    grads = gradients(
        dout, q, k, v, out, lse, dlse=dlse, bounds=window_bounds((window_size_left, window_size_right), causal),
        scale=softmax_scale, softcap=softcap, sink=learnable_sink, deterministic=deterministic,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, mask=mask,
    )  # fmt: skip
    results = tuple(map(store, (dq, dk, dv), grads[:3]))
    return results if grads.dsink is None else (*results, grads.dsink)
