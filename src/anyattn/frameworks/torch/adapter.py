"""Adapter for torch tensors: description, allocation and addresses."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ...definition.dtypes import DTYPES, FLOAT8
from ...definition.problem import Array
from . import tracing

logger = logging.getLogger("anyattn")

NAMES = {getattr(torch, name): name for name in DTYPES}
TORCH_DTYPES = {name: dtype for dtype, name in NAMES.items()}


class TorchAdapter:
    """Adapter protocol for torch.Tensor on any device."""

    name = "torch"

    def describe(self, array: Tensor) -> Array:
        dtype = NAMES.get(array.dtype) or str(array.dtype).removeprefix("torch.")
        return Array(tracing.sizes(array), tuple(array.stride()), dtype, str(array.device))

    def keys(self, arrays: Sequence[Tensor | None]) -> Hashable:
        torch.get_num_threads()  # a thread's first such call passes the number of torch.set_num_threads to OpenMP
        key: list[Any] = []
        for x in arrays:
            if x is None:
                key.append(None)
            else:
                key += (x.shape, x.stride(), x.dtype, x.device)
        return tuple(key)

    def empty(self, shape: Sequence[int], dtype: str, like: Tensor) -> Tensor:
        wanted = TORCH_DTYPES[dtype]
        try:
            if like.dtype is wanted:  # faster, and a tuple of sizes is slower to parse
                return like.new_empty(*shape)
            return torch.empty(*shape, dtype=wanted, device=like.device)
        except RuntimeError as error:
            if like.device.type != "cpu":  # torch raises its own exception on other devices
                raise
            size = math.prod(shape) * wanted.itemsize
            raise MemoryError(f"no memory for {size} bytes: {tuple(shape)} of {dtype}.") from error

    pointer = staticmethod(Tensor.data_ptr)

    def numpy(self, array: Tensor) -> npt.NDArray[Any]:
        array = array.detach().cpu()
        if array.dtype is torch.bfloat16:
            return array.view(torch.uint16).numpy()
        return array.view(torch.uint8).numpy() if NAMES.get(array.dtype) in FLOAT8 else array.numpy()

    def tables_on_host(self, device: str) -> bool:
        return device == "cpu"


adapter = TorchAdapter()


def to_unit_stride(name: str, array: Tensor) -> Tensor:
    """Return the tensor, copied if its last dimension is not contiguous.

    Size 1 and broadcast scores count as contiguous. `block_table` must be fully contiguous, because kernels use its
    width as the row stride.
    """
    if name == "block_table":
        return array.contiguous()
    last = array.stride(-1) if array.ndim else 1
    if last == 1 or array.shape[-1] == 1 or (last == 0 and name in ("bias", "mask")):
        return array
    logger.debug("%s is copied: its last dimension is not contiguous", name)
    return array.contiguous()
