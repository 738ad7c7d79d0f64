"""The functions behind the public API for torch tensors: arguments in canonical form, then autograd.

Everything here is traced by torch.compile: it looks at metadata, never at values, and logs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...definition.kvcache import LABELS
from ...definition.problem import TABLES, Options
from ...runtime import dispatch, execute
from . import autograd, fastpath, kvcache, ops
from .adapter import adapter

Arrays = ops.Arrays


def attention(
    arrays: Arrays, options: Options, seed: int | None, return_lse: bool, backend: str | None, *, want_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """(out, lse) with autograd; draws the dropout state from torch's generator where none is given.

    With return_lse gradients flow through lse; want_lse asks for its values alone. With neither it may be None.
    """
    metadata = None
    if seed is None and not options.dropout_p and _bare(arrays) and not fastpath.maybe_autocast():
        arrays = arrays[:3]
        if arrays[1] is not None and arrays[2] is not None:
            metadata = fastpath.metadata(arrays)  # all the preparation that the commonest call needs
    if metadata is None:
        arrays = prepare(execute.full(arrays), seed, draw=options.dropout_p != 0)
        metadata = fastpath.metadata(arrays)
    return autograd.attention(arrays, metadata, options, return_lse, backend or "", want_lse=want_lse or return_lse)


def _bare(arrays: Arrays) -> bool:
    """Whether only q, k and v are given."""
    _, _, _, a, b, c, d, e, f, g, h, i, j, l, m, n = arrays
    return a is b is c is d is e is f is g is h is i is j is l is m is n is None


def forward(arrays: Arrays, options: Options, seed: int | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """(out, lse) without autograd."""
    prepared = _detach(prepare(arrays, seed))
    metadata = fastpath.metadata(prepared)
    if metadata is not None:
        return execute.forward(adapter, prepared, options, backend, metadata)
    out, lse = ops.forward(*prepared, *options, backend or "")
    return out, lse


def backward(saved: Arrays, arrays: Arrays, options: Options, seed: int | None, backend: str | None) -> Arrays:
    """(dq, dk, dv, dbias or None, dsink or None) from saved = (out, lse, dout, dlse or None)."""
    prepared = _detach(prepare(arrays, seed))
    for name, x in zip(("out", "lse", "dout"), saved[:3], strict=True):
        _tensor(name, x)
    out, lse, dout, dlse = _detach(saved)
    dlse = None if dlse is None else _tensor("dlse", dlse)
    metadata = fastpath.metadata((*prepared, out, lse, dout, dlse))
    if metadata is not None:
        grads = execute.backward(adapter, (out, lse, dout, dlse), prepared, options, backend, metadata)
    else:
        grads = ops.backward(dout, *prepared, out, lse, dlse, *options, backend or "")
    dq, dk, dv, dbias, dsink = grads
    dbias = None if arrays[3] is None else dbias.reshape(arrays[3].shape)
    return dq, dk, dv, dbias, None if arrays[6] is None else dsink


def explain(arrays: Arrays, options: Options, seed: int | None, backend: str | None) -> dispatch.Explanation:
    return execute.explain(adapter, ops.contiguous_rows(prepare(arrays, seed)), options, backend)


def warmup(arrays: Arrays, options: Options, seed: int | None, backend: str | None, *, backward: bool) -> None:
    execute.warmup(adapter, ops.contiguous_rows(prepare(arrays, seed)), options, backend, backward=backward)


def check(arrays: Arrays, options: Options, backend: str | None) -> None:
    execute.check(adapter, ops.contiguous_rows(prepare(arrays, None)), options, backend)


def append(
    arrays: dict[str, Any],
    *,
    check: Callable[[Tensor | None], None],
    interleaved: bool,
    by_row: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Appends to the cache in place; returns q (rotated) and the keys in use per sequence (None: all).

    `check` is given the latter and raises if the attention would; it runs before anything is written.
    """
    q, lengths = _tensor("q", arrays["q"]), arrays["cache_seqlens"]
    if lengths is not None:
        batch = q.shape[0] if q.ndim else 0
        if isinstance(lengths, (int, np.integer)):
            lengths = per_sequence("cache_seqlens", lengths, batch, q.device)
        lengths = table("cache_seqlens", lengths)
    if arrays["new_k"] is None:
        if arrays["new_v"] is not None or arrays["rotary_cos"] is not None:
            raise ValueError("v and rotary_cos need k, the new keys, as well")
        return q, lengths
    given: dict[str, Any] = {
        name: None if x is None else _tensor(LABELS.get(name, name), x)
        for name, x in arrays.items()
        if name != "cache_seqlens"
    }
    given["cache_seqlens"] = lengths
    for name in ("block_table", "cache_batch_idx"):
        given[name] = None if given[name] is None else table(name, given[name])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given.values()):
        raise ValueError(
            "no gradients flow through a KV cache: append under torch.no_grad(), or detach q, k, v and the caches"
        )
    if _autocast_dtype(q) is not None:
        for name in ("q", "new_k", "new_v"):  # the cache's dtype is what it is
            given[name] = given[name].to(given["k"].dtype) if given[name].dtype in _CASTABLE else given[name]
    used = None if lengths is None else lengths + sum(given["new_k"].shape[1:2])  # of another rank, it is refused below
    rotation = {"interleaved": interleaved, "by_row": by_row}
    return kvcache.append(given, check=lambda: check(used), **rotation, backend=backend), used


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See api.merge; differentiable in all four."""
    top = torch.maximum(lse_a, lse_b).detach()
    safe = torch.where(torch.isfinite(top), top, 0.0)
    total = torch.exp(lse_a - safe) + torch.exp(lse_b - safe)
    some = torch.where(total > 0, total, 1.0)  # no key in either: no NaN, in the gradients neither
    lse = torch.where(total > 0, safe + torch.log(some), -torch.inf)
    weight = (torch.exp(lse_b - safe) / some).transpose(-1, -2).unsqueeze(-1)
    a, b = out_a.to(lse.dtype), out_b.to(lse.dtype)
    return (a + weight * (b - a)).to(out_a.dtype), lse


def prepare(arrays: Arrays, seed: int | None, *, draw: bool = False) -> Arrays:
    """The arrays as the operators take them. Conversions are outside the autograd.Function, so gradients pass them."""
    q, k, v, bias, mask, slopes, sink = arrays[:7]
    tables, rng_state = arrays[7:15], arrays[15]
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        q, k, v = (_tensor(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    low = _autocast_dtype(q)
    if low is not None:
        q, k, v = (x.to(low) if x.dtype in _CASTABLE else x for x in (q, k, v))
    if bias is not None:
        bias = _scores("bias", bias)
        if low is not None and bias.dtype in _CASTABLE - {torch.float32}:
            bias = bias.to(low)  # float32 is accepted beside any dtype
    if mask is not None:
        mask = _scores("mask", mask)
    if slopes is not None:
        slopes = _floats("alibi_slopes", slopes, q.dtype)
        if slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes requires grad, but has no gradient here: pass alibi_slopes.detach()")
    if sink is not None:
        sink = _floats("sink", sink, q.dtype)
    cu_q, cu_k, used_q, used_k, leftpad, offset, pages, entries = tables
    if not (cu_q is cu_k is used_q is used_k is leftpad is offset is pages is entries is None):
        tables = _tables(q, tables)
    if seed is not None or rng_state is not None or draw:
        rng_state = random_state(q, seed, rng_state)
    return (q, k, v, bias, mask, slopes, sink, *tables, rng_state)


_CASTABLE = frozenset((torch.float32, torch.float16, torch.bfloat16))


def _autocast_dtype(q: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for, or None outside it."""
    if not fastpath.maybe_autocast():
        return None
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _tensor(name: str, array: Any) -> Tensor:
    if not isinstance(array, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor like q; got {type(array).__name__}")
    return array


def _scores(name: str, array: Any) -> Tensor:
    """A view with four dimensions."""
    x = _tensor(name, array)
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape)) if x.ndim < 4 else x


def _floats(name: str, array: Any, dtype: torch.dtype) -> Tensor:
    x = _tensor(name, array)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {x.dtype}")
    return x.to(torch.float64 if dtype is torch.float64 else torch.float32).contiguous()


def _tables(q: Tensor, tables: Arrays) -> Arrays:
    given = dict(zip(TABLES, tables, strict=True))
    if isinstance(given["offset"], (int, np.integer)):
        cu_seqlens_q = given["cu_seqlens_q"]
        batch = q.shape[0] if cu_seqlens_q is None else _tensor("cu_seqlens_q", cu_seqlens_q).shape[0] - 1
        given["offset"] = per_sequence("offset", given["offset"], batch, q.device)
    return tuple([None if x is None else table(name, x) for name, x in given.items()])


def per_sequence(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """One int, or NumPy's, for every sequence."""
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} must fit in int32; got {value}")
    return torch.full((batch,), value, dtype=torch.int32, device=device)


def table(name: str, array: Any) -> Tensor:
    """int32 and contiguous; integers of other widths are converted."""
    x = _tensor(name, array)
    if x.dtype is torch.int32:
        return x.contiguous()
    if x.is_floating_point() or x.is_complex() or x.dtype is torch.bool:
        raise TypeError(f"{name} must hold integers; got {x.dtype}")
    if x.device.type == "cpu" and x.dtype is torch.int64 and x.numel() and fastpath.plain((x,)):
        low, high = (int(bound) for bound in x.aminmax())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} must fit in int32; got {low} to {high}")
    return x.to(torch.int32).contiguous()


def random_state(q: Tensor, seed: int | None = None, rng_state: Any = None) -> Tensor:
    """int64 (seed, offset) on q's device, drawn from torch's generator if neither is given."""
    if rng_state is not None:
        if seed is not None:
            raise ValueError("seed and rng_state exclude each other: rng_state is (seed, offset)")
        return _tensor("rng_state", rng_state).contiguous()
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=q.device)
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer; got {seed!r}") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be a 64-bit integer; got {number}")
    number = number - 2**64 if number >= 2**63 else number
    # kernels alone, no copy from the host: this can be captured in a CUDA graph
    return torch.nn.functional.pad(torch.full((1,), number, dtype=torch.int64, device=q.device), (0, 1))


def _detach(arrays: Arrays) -> Arrays:
    return tuple([x.detach() if isinstance(x, Tensor) else x for x in arrays])
