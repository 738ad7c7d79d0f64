"""Features of flash_attn 3's cache in addition to `attention_with_kvcache`: packed queries and keys, rotary, fp8.

New keys are appended token by token, each as a sequence of its own, so that one append supports packed and dense keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...arguments import make_request
from ...definition.inputs import Appended
from ...definition.options import Rotation
from ...frameworks import framework_of
from ...frameworks.torch_tools import per_sequence
from ...frameworks.torch_tools import rotary as rotations
from .._flash_attn_common.calls import Bounds, rows_of
from .._flash_attn_common.inputs import FP8


class Rotary(NamedTuple):
    """Rotary tables (positions, rotary_dim / 2), and the pairing of values."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool


@dataclass
class NewKeys:
    """Keys and values to append, dense (batch, seqlen_new, ...) or packed, and their positions."""

    k: Tensor | None
    v: Tensor | None
    cu_seqlens: Tensor | None
    cache_seqlens: int | Tensor | None
    rotary: Rotary | None
    rotary_seqlens: Tensor | None

    def append(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, bounds: Bounds, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Write the keys, unless attention with `options` would raise; return the rotated q and the keys in use."""
        cu_seqlens_q = options["cu_seqlens_q"]
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        first = self.cache_seqlens
        if first is not None:
            first = per_sequence("cache_seqlens", first, batch, q.device)
        if self.k is None or self.v is None:
            self._check_absent()
            return q, first
        if first is None or first.shape != (batch,):
            shape = None if first is None else tuple(first.shape)
            raise ValueError(f"cache_seqlens must be an int or ({batch},) if k and v are appended, got {shape}.")
        k = self.k
        sequences = k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        if sequences != batch:
            raise ValueError(f"k must have q's batch {batch}, got {sequences} sequences of new keys.")
        if self.rotary is not None:
            start = first if self.rotary_seqlens is None else self.rotary_seqlens
            by_row = bounds != (None, None) or options["chunk"] > 0
            q = _rotate(q, self.rotary, start, cu_seqlens_q, by_row)
            k = _rotate(k, self.rotary, start, self.cu_seqlens, True)
        elif self.rotary_seqlens is not None:
            raise ValueError("rotary_cos and rotary_sin must be passed with rotary_seqlens, got None.")
        sequence, row, inside = _tokens(k, self.cu_seqlens)
        lengths = k.shape[1] if self.cu_seqlens is None else self.cu_seqlens.diff()
        used = first + lengths
        new_k, new_v = (x.flatten(0, 1) if self.cu_seqlens is None else x[inside] for x in (k, self.v))
        _append((q, k_cache, v_cache, new_k, new_v), sequence, first[sequence] + row, {**options, "seqused_k": used})
        return q, used

    def _check_absent(self) -> None:
        for name in ("k", "v", "rotary", "rotary_seqlens"):
            if getattr(self, name) is not None:
                raise ValueError(f"k and v must be passed with {name if name != 'rotary' else 'rotary_cos'}, got None.")
        if self.cu_seqlens is not None:
            raise ValueError("k and v must be passed with cu_seqlens_k_new, got None.")


def _append(arrays: tuple[Tensor, ...], sequence: Tensor, slots: Tensor, options: dict[str, Any]) -> None:
    q, k_cache, v_cache, new_k, new_v = (_as_words(x) for x in arrays)
    pages, entries = options["block_table"], options["cache_batch_idx"]
    if pages is None:
        entries = sequence if entries is None else entries[sequence]
    framework = framework_of(q)

    def check(used: Tensor | None) -> None:
        inputs, chosen, _, backend, _ = make_request(q, k_cache, v_cache, (None, None), **options)
        framework.check(inputs, chosen, backend)

    appended = Appended(
        q=new_k[:, None],
        k=k_cache,
        v=v_cache,
        new_k=new_k[:, None],
        new_v=new_v[:, None],
        cache_seqlens=slots,
        cache_batch_idx=entries if pages is None else None,
        block_table=None if pages is None else pages[sequence],
    )
    framework.append(appended, Rotation(interleaved=True, by_row=True), None, check=check)


def _as_words(x: Tensor) -> Tensor:
    """Return fp8 values as 16-bit values, two in one, which backends can copy."""
    if x.dtype is not FP8:
        return x
    if x.shape[-1] % 2:
        raise ValueError(f"head_dim must be even for an fp8 cache, got {x.shape[-1]}.")
    return x.view(torch.float16)


def _tokens(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (sequence, row, kept rows of packed x) of every token of x that belongs to a sequence."""
    if cu_seqlens is not None:
        sequence, row, inside = rows_of(cu_seqlens, x.shape[0])
        return sequence[inside], row[inside], inside
    batch, rows = x.shape[:2]
    sequence, row = torch.meshgrid(*(torch.arange(size, device=x.device) for size in (batch, rows)), indexing="ij")
    return sequence.flatten(), row.flatten(), None


def _rotate(x: Tensor, rotary: Rotary, first: Tensor, cu_seqlens: Tensor | None, by_row: bool) -> Tensor:
    """Rotate x, dense or packed, by the angles of the positions first + row, or of first."""
    cos, sin, interleaved = rotary
    if x.dtype is FP8:
        raise ValueError("rotary_cos cannot be combined with fp8 inputs. Rotate q and k before the conversion.")
    if cos is None or sin is None or cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        shapes = [None if table is None else tuple(table.shape) for table in (cos, sin)]
        raise ValueError(
            f"rotary_cos and rotary_sin must be (positions, rotary_dim / 2), got {shapes[0]}, {shapes[1]}."
        )
    if cu_seqlens is None:
        positions = first[:, None] + torch.arange(x.shape[1], device=x.device) * by_row
    else:
        sequence, row, inside = rows_of(cu_seqlens, x.shape[0])
        positions = torch.where(inside, first[sequence] + row * by_row, 0)[None]
    if positions.numel() and positions.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"rotary_cos must have positions {low} to {high}, got {cos.shape[0]} positions.")
    if cu_seqlens is None:
        return rotations.rotate(x, cos, sin, positions, interleaved)
    return rotations.rotate(x[None], cos, sin, positions, interleaved)[0]
