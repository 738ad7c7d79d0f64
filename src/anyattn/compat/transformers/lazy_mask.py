"""Mask for transformers' models: a real mask for their code, a pattern for `attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Pattern(NamedTuple):
    """Pattern of visible keys: query i attends to the keys j with offset + i - left <= j <= offset + i + right.

    None: unbounded.
    """

    left: int | None = None
    right: int | None = None
    offset: int = 0
    padding: Tensor | None = None  # bool (batch, seqlen_k): False masks the key for every query
    cu_seqlens: Tensor | None = None  # packed: cumulative lengths over the tokens of the whole batch


class LazyMask(torch.Tensor):
    """Additive mask of transformers' eager attention, (batch, 1, seqlen_q, seqlen_k), computed when it is read.

    It needs memory for one number until an operation reads the mask; queries of shape, dtype and device do not. After
    that the dense mask decides, because a view of it may have been changed. `attention` reads `pattern` instead.
    """

    pattern: Pattern
    _compute: Callable[[], Tensor]
    _dense: Tensor | None

    @staticmethod
    def __new__(
        cls: type[LazyMask],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        pattern: Pattern,
        compute: Callable[[], Tensor],
    ) -> LazyMask:
        mask: LazyMask = torch.zeros((), dtype=dtype, device=device).expand(shape).as_subclass(cls)
        mask.pattern, mask._compute, mask._dense = pattern, compute, None
        return mask

    @property
    def is_dense(self) -> bool:
        """Return whether something has read the values, so that `pattern` may no longer be valid."""
        return self._dense is not None

    def dense(self) -> Tensor:
        """Return the additive mask: 0 for a visible key, finfo.min for a masked one."""
        if self._dense is None:
            self._dense = self._compute()
        return self._dense

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyMask({tuple(self.shape)}, {self.pattern})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in QUESTIONS:
                return function(*args, **kwargs)
            if function is torch.Tensor.detach or (function == SET_REQUIRES_GRAD and not args[1]):
                return args[0]  # for reentrant checkpointing
            if function is torch.Tensor.to and not args[0].is_dense:
                return _moved(*args, **kwargs)
            return function(*tree_map(_read, args), **tree_map(_read, kwargs))


QUESTIONS = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.__len__}
QUESTIONS |= {torch.Tensor.is_floating_point, torch.is_floating_point, torch.Tensor.stride, torch.Tensor.storage_offset}
QUESTIONS |= {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")}
SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def _read(x: Any) -> Any:
    return x.dense() if isinstance(x, LazyMask) else x


def _moved(mask: LazyMask, *args: Any, **kwargs: Any) -> Tensor:
    """Return mask.to(...), still lazy if only the device changes, as in models that are spread over devices."""
    target = torch.empty(0, dtype=mask.dtype, device=mask.device).to(*args, **kwargs)
    if target.dtype != mask.dtype or kwargs.get("copy"):
        return mask.dense().to(*args, **kwargs)
    if target.device == mask.device:
        return mask
    left, right, offset, padding, cu_seqlens = mask.pattern
    padding = None if padding is None else padding.to(target.device)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(target.device)
    pattern = Pattern(left, right, offset, padding, cu_seqlens)
    return LazyMask(tuple(mask.shape), mask.dtype, target.device, pattern, lambda: mask.dense().to(target.device))
