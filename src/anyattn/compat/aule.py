"""The aule package: attention of (batch, nheads, seqlen, head_dim) NumPy arrays and torch tensors, and its SDPA patch.

Its GPU handles (Aule, GpuTensor, flash_attention_paged_amd) are not here: no program that only computes attention needs
them, and `anyattn.attention_with_kvcache` has pages.
"""

from __future__ import annotations

import sys
from typing import Any

from .. import api
from ..runtime import dispatch
from ..sdpa import sdpa as anyattn_sdpa

__version__ = "0.5.0"  # whose functions these are


Array = Any  # a NumPy array or a torch tensor


def flash_attention(
    query: Array,
    key: Array,
    value: Array,
    causal: bool = True,
    scale: float | None = None,
    *,
    rot_cos: Array | None = None,
    rot_sin: Array | None = None,
) -> Array:
    """Attention that is causal by default, aligned to the top left: row i sees the keys 0 to i.

    `anyattn.flash_attention` is the same with the last row at the last key.

    Args:
        query: (batch, nheads, seqlen_q, head_dim), NumPy or torch. key, value: (batch, nheads_kv, seqlen_k, head_dim).
        scale: default head_dim ** -0.5.
        rot_cos, rot_sin: (length, head_dim / 2) or (1, length, head_dim / 2), torch: rotates query and key, see
            `apply_rope_separate`. By keyword: in version 0.5 they were in causal's place, which would be ambiguous.

    Returns:
        (batch, nheads, seqlen_q, head_dim), of query's kind and dtype; a torch result has gradients.

    >>> import numpy as np
    >>> x = np.ones((1, 2, 16, 8), np.float32)
    >>> flash_attention(x, x, x, causal=True).shape
    (1, 2, 16, 8)
    """
    if getattr(causal, "ndim", 0):
        raise TypeError("causal must be a bool: pass rot_cos and rot_sin by keyword")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if getattr(array, "ndim", None) != 4:
            got = getattr(array, "shape", type(array).__name__)
            raise ValueError(f"{name} must be (batch, nheads, seqlen, head_dim), got {got}")
    if (rot_cos is None) != (rot_sin is None):
        raise ValueError("rot_cos and rot_sin must be given together")
    if rot_cos is not None:
        query, key = apply_rope_separate(query, key, rot_cos, rot_sin)
    q, k, v = (array.swapaxes(1, 2) for array in (query, key, value))
    return api.attention(q, k, v, causal=bool(causal), alignment="top-left", scale=scale).swapaxes(1, 2)


attention = flash_attention


def flash_attention_rope(
    q: Array,
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    causal: bool = True,
    scale: float | None = None,
    window_size: int = -1,
) -> Array:
    """`flash_attention` of rotated q and k; a window keeps the keys up to window_size before (and after) a row's place.

    window_size: -1: off.
    """
    q, k = apply_rope_separate(q, k, cos, sin)
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    window = None if window_size < 0 else (window_size, window_size)
    out = api.attention(q, k, v, causal=causal, window=window, alignment="top-left", scale=scale)
    return out.swapaxes(1, 2)


def precompute_rope_frequencies(
    seq_len: int, head_dim: int, base: float = 10000.0, device: Any = "cpu", dtype: Any = None
) -> tuple[Any, Any]:
    """(cos, sin) of the angles p * base ** (-2 i / head_dim), torch tensors (seq_len, head_dim / 2).

    dtype: default float32; the angles are computed in float32.

    >>> cos, sin = precompute_rope_frequencies(16, 8)
    >>> cos.shape
    torch.Size([16, 4])
    """
    import torch

    from ..frameworks.torch_tools import rotary

    rows = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(rows, rotary.frequencies(head_dim, base, device))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope_separate(q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """q and k (batch, nheads, seqlen, head_dim), torch, row i rotated by row i of cos and sin (length, head_dim / 2).

    (x_i, x_(i + d/2)) -> (x_i cos_i - x_(i + d/2) sin_i, x_i sin_i + x_(i + d/2) cos_i)
    """
    from ..frameworks.torch_tools import dense
    from .flash_attn.ops.triton.rotary import apply_rotary

    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not hasattr(x, "__torch_function__"):
            raise TypeError(f"{name} must be a torch.Tensor where rows are rotated, got {type(x).__name__}")
        dense(name, x)
    tables = [table.reshape(table.shape[-2:]) for table in (cos, sin)]
    q, k = (apply_rotary(x.transpose(1, 2), *tables).transpose(1, 2) for x in (q, k))
    return q, k


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """`anyattn.sdpa`, on the backend that `install` names."""
    if _patch.verbose:
        sys.stdout.write(f"anyattn: {_patch.backend or 'auto'} | shape={tuple(query.shape)} | causal={is_causal}\n")
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if _patch.backend is None:
        return anyattn_sdpa(query, key, value, attn_mask, dropout_p, is_causal, **options)
    with dispatch.backend(_patch.backend):
        return anyattn_sdpa(query, key, value, attn_mask, dropout_p, is_causal, **options)


class _Patch:
    """What `install` replaced, and what it was told."""

    original: Any = None
    backend: str | None = None
    verbose: bool = False


_patch = _Patch()


def install(backend: str | None = None, verbose: bool = False) -> None:
    """Replaces torch.nn.functional.scaled_dot_product_attention by anyattn's; a second call changes its options.

    Args:
        backend: one of `get_available_backends()`; default: automatic. verbose: prints a line per call.

    >>> import torch
    >>> install()
    >>> x = torch.ones(1, 2, 16, 8)
    >>> torch.nn.functional.scaled_dot_product_attention(x, x, x).shape
    torch.Size([1, 2, 16, 8])
    >>> uninstall()
    """
    import torch

    if backend is not None:
        dispatch.get(backend)
    if _patch.original is None:
        _patch.original = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
    _patch.backend, _patch.verbose = backend, verbose


def uninstall() -> None:
    """Gives torch its own function back; without an `install` it does nothing."""
    import torch

    if _patch.original is not None:
        torch.nn.functional.scaled_dot_product_attention = _patch.original
        _patch.original, _patch.backend, _patch.verbose = None, None, False


def get_available_backends() -> list[str]:
    """Names of the backends that run here, best first."""
    return dispatch.available()


def get_backend_info() -> dict[str, dict[str, Any]]:
    """For each backend that runs here {"available": True, "description": text}."""
    return {name: {"available": True, "description": DESCRIPTIONS[name]} for name in dispatch.available()}


DESCRIPTIONS = {
    "cpu": "native engine, forward and backward",
    "triton": "NVIDIA, AMD and Intel GPUs through Triton, forward and backward",
    "vulkan": "GPUs with a Vulkan driver, forward and backward",
    "numpy": "NumPy, forward and backward",
}


def print_backend_info() -> None:
    """Prints the backends that run here, numbered, best first."""
    from .. import __version__ as version

    names = dispatch.available()
    lines = ["=" * 60, f"ANYATTN v{version} (as AULE-ATTENTION)", "=" * 60, "", f"Available backends: {names}", ""]
    for number, (name, info) in enumerate(get_backend_info().items(), 1):
        primary = " (primary)" if number == 1 else ""
        lines += [f"[{number}] {name.upper()}{primary}", f"    Status: {info['description']}", ""]
    sys.stdout.write("\n".join([*lines, "=" * 60, ""]))
