"""aule package: attention on (batch, nheads, seqlen, head_dim) NumPy arrays and torch tensors, and its SDPA patch.

The package's GPU handles (Aule, GpuTensor, flash_attention_paged_amd) are not provided, because programs that only
compute attention do not need them. `anyattn.attention_with_kvcache` supports pages.
"""

from __future__ import annotations

import sys
from typing import Any

from .. import api
from ..runtime import dispatch
from ..sdpa import sdpa as anyattn_sdpa

__version__ = "0.5.0"  # version of these functions


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
    """Compute attention, causal by default and aligned to the top left.

    `anyattn.flash_attention` is aligned to the bottom right instead.

    Args:
        query: (batch, nheads, seqlen_q, head_dim), NumPy array or torch tensor.
        key: (batch, nheads_kv, seqlen_k, head_dim).
        value: (batch, nheads_kv, seqlen_k, head_dim).
        causal: query i attends to keys 0 to i (aligned to the top left).
        scale: default head_dim ** -0.5.
        rot_cos: torch tensor (length, head_dim / 2) or (1, length, head_dim / 2). It rotates query and key, see
            `apply_rope_separate`. Pass it by keyword, because in version 0.5 it had causal's position.
        rot_sin: in rot_cos's shape.

    Returns:
        (batch, nheads, seqlen_q, head_dim), in query's kind and dtype. A torch result has gradients.

    >>> import numpy as np
    >>> x = np.ones((1, 2, 16, 8), np.float32)
    >>> flash_attention(x, x, x, causal=True).shape
    (1, 2, 16, 8)
    """
    if getattr(causal, "ndim", 0):
        raise TypeError("causal must be a bool. Pass rot_cos and rot_sin by keyword.")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if getattr(array, "ndim", None) != 4:
            got = getattr(array, "shape", type(array).__name__)
            raise ValueError(f"{name} must be (batch, nheads, seqlen, head_dim), got {got}.")
    if (rot_cos is None) != (rot_sin is None):
        raise ValueError("rot_cos and rot_sin must be passed together, got one of them.")
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
    """Compute `flash_attention` of rotated q and k, with an optional window.

    Args:
        q: (batch, nheads, seqlen_q, head_dim), torch.
        k: (batch, nheads_kv, seqlen_k, head_dim).
        v: (batch, nheads_kv, seqlen_k, head_dim).
        cos: (length, head_dim / 2) or (1, length, head_dim / 2).
        sin: in cos's shape.
        causal: query i attends to keys 0 to i (aligned to the top left).
        scale: default head_dim ** -0.5.
        window_size: number of keys before (and after) the position of a query that it attends to; -1: off.

    Returns:
        (batch, nheads, seqlen_q, head_dim).
    """
    q, k = apply_rope_separate(q, k, cos, sin)
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    window = None if window_size < 0 else (window_size, window_size)
    out = api.attention(q, k, v, causal=causal, window=window, alignment="top-left", scale=scale)
    return out.swapaxes(1, 2)


def precompute_rope_frequencies(
    seq_len: int, head_dim: int, base: float = 10000.0, device: Any = "cpu", dtype: Any = None
) -> tuple[Any, Any]:
    """Compute cos and sin of the angles p * base ** (-2 i / head_dim).

    Args:
        seq_len: number of positions.
        head_dim: size of a head.
        base: base of the frequencies.
        device: device of the tables.
        dtype: default float32. The angles are computed in float32.

    Returns:
        (cos, sin), torch tensors (seq_len, head_dim / 2).

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
    """Rotate row i of q and k by row i of cos and sin.

        (x_i, x_(i + d/2)) -> (x_i cos_i - x_(i + d/2) sin_i, x_i sin_i + x_(i + d/2) cos_i)

    Args:
        q: torch tensor (batch, nheads, seqlen, head_dim).
        k: torch tensor (batch, nheads, seqlen, head_dim).
        cos: (length, head_dim / 2) or (1, length, head_dim / 2).
        sin: in cos's shape.

    Returns:
        q and k, rotated.
    """
    from ..frameworks.torch_tools import dense
    from .flash_attn.ops.triton.rotary import apply_rotary

    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not hasattr(x, "__torch_function__"):
            raise TypeError(f"{name} must be a torch.Tensor for rotary positions, got {type(x).__name__}.")
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
    """Compute `anyattn.sdpa` on the backend chosen with `install`.

    Args:
        query: (..., nheads, seqlen_q, head_dim).
        key: (..., nheads_kv, seqlen_k, head_dim).
        value: (..., nheads_kv, seqlen_k, head_dim_v).
        attn_mask: boolean (False masks a key) or added to the scaled scores; broadcastable to (..., nheads, seqlen_q,
            seqlen_k).
        dropout_p: applied whenever > 0, as in torch.
        is_causal: query i attends to keys 0 to i.
        scale: default head_dim ** -0.5.
        enable_gqa: allow nheads to be a multiple of nheads_kv.

    Returns:
        (..., nheads, seqlen_q, head_dim_v).
    """
    if _patch.verbose:
        sys.stdout.write(f"anyattn: {_patch.backend or 'auto'} | shape={tuple(query.shape)} | causal={is_causal}\n")
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if _patch.backend is None:
        return anyattn_sdpa(query, key, value, attn_mask, dropout_p, is_causal, **options)
    with dispatch.backend(_patch.backend):
        return anyattn_sdpa(query, key, value, attn_mask, dropout_p, is_causal, **options)


class _Patch:
    """Function that `install` replaced, and the options of `install`."""

    original: Any = None
    backend: str | None = None
    verbose: bool = False


_patch = _Patch()


def install(backend: str | None = None, verbose: bool = False) -> None:
    """Replace torch.nn.functional.scaled_dot_product_attention by anyattn's.

    A second call changes the options.

    Args:
        backend: one of `get_available_backends()`; default: automatic.
        verbose: print a line per call.

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
    """Restore torch's own function. Without an `install` this does nothing."""
    import torch

    if _patch.original is not None:
        torch.nn.functional.scaled_dot_product_attention = _patch.original
        _patch.original, _patch.backend, _patch.verbose = None, None, False


def get_available_backends() -> list[str]:
    """Return the names of the backends that run on this machine, best first."""
    return dispatch.available()


def get_backend_info() -> dict[str, dict[str, Any]]:
    """Return {"available": True, "description": text} for each backend that runs on this machine."""
    return {name: {"available": True, "description": DESCRIPTIONS[name]} for name in dispatch.available()}


DESCRIPTIONS = {
    "cpu": "CPU engine, forward and backward",
    "triton": "NVIDIA, AMD and Intel GPUs through Triton, forward and backward",
    "vulkan": "GPUs with a Vulkan driver, forward and backward",
    "numpy": "NumPy, forward and backward",
}


def print_backend_info() -> None:
    """Print the backends that run on this machine, numbered, best first."""
    from .. import __version__ as version

    names = dispatch.available()
    lines = ["=" * 60, f"ANYATTN v{version} (as AULE-ATTENTION)", "=" * 60, "", f"Available backends: {names}", ""]
    for number, (name, info) in enumerate(get_backend_info().items(), 1):
        primary = " (primary)" if number == 1 else ""
        lines += [f"[{number}] {name.upper()}{primary}", f"    Status: {info['description']}", ""]
    sys.stdout.write("\n".join([*lines, "=" * 60, ""]))
