"""Functions of flash_attn 2 for packed sequences of different lengths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._flash_attn_common.calls import attend, unpack
from ._private import Scores, forward, varlen_tables


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Compute attention over sequences that are concatenated without padding.

    Args:
        q: (total_q, nheads, head_dim).
        k: (total_k, nheads_kv, head_dim); with block_table, pages (num_pages, page_size, nheads_kv, head_dim).
        v: like k, with head_dim_v.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k: int32 (batch + 1,), cumulative lengths of the key sequences; with block_table only the lengths.
        max_seqlen_q: at least the longest query length; a smaller value raises ValueError.
        max_seqlen_k: at least the longest key length; a smaller value raises ValueError.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        return_attn_probs: also return softmax_lse and S_dmask.
        block_table: int32 (batch, max_pages), pages of each sequence, of any size.

    Returns:
        out (total_q, nheads, head_dim_v). With return_attn_probs: (out, softmax_lse, S_dmask), softmax_lse float32
        (nheads, total_q), S_dmask with the longest lengths.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: dropout_p is combined with softcap.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_varlen_func
    >>> x, cu_seqlens = torch.ones(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
    torch.Size([7, 2, 8])
    """
    tables = varlen_tables(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    scores = Scores(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if not return_attn_probs:
        return attend(q, k, v, **scores.arguments(), **tables)[0]
    return forward(q, k, v, scores, True, **tables)[:3]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute `flash_attn_varlen_func` for packed keys and values, used as views.

    Args:
        q: (total_q, nheads, head_dim).
        kv: (total_k, 2, nheads_kv, head_dim), keys and values.
        cu_seqlens_q: int32 (batch + 1,), cumulative lengths of the query sequences.
        cu_seqlens_k: int32 (batch + 1,), cumulative lengths of the key sequences.
        max_seqlen_q: at least the longest query length; a smaller value raises ValueError.
        max_seqlen_k: at least the longest key length; a smaller value raises ValueError.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (total_q, nheads, head_dim). With return_attn_probs: (out, softmax_lse, S_dmask), softmax_lse float32
        (nheads, total_q), S_dmask with the longest lengths.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: dropout_p is combined with softcap.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_varlen_kvpacked_func
    >>> q, kv, cu_seqlens = torch.ones(7, 4, 8), torch.ones(7, 2, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 4, 4).shape
    torch.Size([7, 4, 8])
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = unpack("kv", kv, 4)
    return flash_attn_varlen_func(q, k, v, *(*lengths, *options))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute `flash_attn_varlen_func` for packed queries, keys and values, used as views.

    Args:
        qkv: (total, 3, nheads, head_dim), queries, keys and values.
        cu_seqlens: int32 (batch + 1,), cumulative lengths of the sequences.
        max_seqlen: at least the longest length; a smaller value raises ValueError.
        dropout_p: dropout probability; torch's default generator gives the random state. Not combined with softcap.
        softmax_scale: any finite number; default head_dim ** -0.5.
        causal: aligned to the bottom right: query i attends to keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, relative to position i + seqlen_k - seqlen_q; -1: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (nheads,) or (batch, nheads); they have no gradient.
        deterministic: guarantee identical results from run to run, or raise. The CPU backend is always deterministic.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (total, nheads, head_dim). With return_attn_probs: (out, softmax_lse, S_dmask), softmax_lse float32 (nheads,
        total), S_dmask with the longest lengths.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: dropout_p is combined with softcap.

    >>> import torch
    >>> from anyattn.compat.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> qkv, cu_seqlens = torch.ones(7, 3, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 4, causal=True).shape
    torch.Size([7, 2, 8])
    """
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = unpack("qkv", qkv, 4)
    return flash_attn_varlen_func(q, k, v, *(*lengths, *options))
