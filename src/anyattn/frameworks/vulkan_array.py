"""Arrays on a Vulkan device in, arrays on it out. Everything but q, k, v and the caches comes from the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.base import Call
from ..backends.vulkan.device_array import DeviceArray
from ..definition.problem import INPUTS, Array, Options
from ..runtime import dispatch, execute
from . import numpy as numpy_arrays

NDArray = npt.NDArray[Any]
BACKEND = "vulkan"


class VulkanAdapter:
    """Device arrays, and what the host brings along for them: it counts as being where they are."""

    name = "vulkan"

    def __init__(self, device: str = "vulkan:0") -> None:
        self._device = device

    def describe(self, array: Any) -> Array:
        if isinstance(array, DeviceArray):
            return array.describe()
        found = numpy_arrays.adapter.describe(array)
        return Array(found.shape, found.strides, found.dtype, self._device)

    def keys(self, arrays: Sequence[Any]) -> Hashable:
        return tuple([None if x is None else self.describe(x) for x in arrays])

    def empty(self, shape: Sequence[int], dtype: str, like: DeviceArray) -> DeviceArray:
        return DeviceArray.zeros(tuple(shape), like.dtype)

    def pointer(self, array: Any) -> int:
        raise TypeError("a device array has no address")

    def numpy(self, array: Any) -> NDArray:
        return array.numpy() if isinstance(array, DeviceArray) else numpy_arrays.adapter.numpy(array)


def attention(
    arrays: execute.Arrays, options: Options, seed: int | None, return_lse: bool, backend: str | None
) -> tuple[DeviceArray, NDArray]:
    del return_lse
    if options.dropout_p and arrays[-1] is None and seed is None:
        arrays = (*arrays[:-1], np.random.randint(-(2**63), 2**63 - 1, 2, dtype=np.int64))
    return forward(arrays, options, seed, backend)


def forward(
    arrays: execute.Arrays, options: Options, seed: int | None, backend: str | None
) -> tuple[DeviceArray, NDArray]:
    """(out, lse): out on the device, lse in host memory."""
    prepared = prepare(arrays, seed)
    adapter = _adapter(prepared[0])
    ready = execute.find(adapter, prepared, options, backend or BACKEND)
    call = Call(adapter, *prepared)
    call.out = DeviceArray.zeros(ready.out_shape, prepared[0].dtype)
    call.lse = np.empty(ready.lse_shape, np.float32)
    ready.plan.forward(call)
    return call.out, call.lse


def backward(
    saved: execute.Arrays, arrays: execute.Arrays, options: Options, seed: int | None, backend: str | None
) -> execute.Arrays:
    raise TypeError("device arrays have no gradients: call attention_backward with NumPy arrays")


def explain(arrays: execute.Arrays, options: Options, seed: int | None, backend: str | None) -> dispatch.Explanation:
    prepared = prepare(arrays, seed)
    return execute.explain(_adapter(prepared[0]), prepared, options, backend or BACKEND)


def check(arrays: execute.Arrays, options: Options, backend: str | None) -> None:
    prepared = prepare(arrays, None)
    execute.check(_adapter(prepared[0]), prepared, options, backend or BACKEND)


def append(
    arrays: dict[str, Any],
    *,
    check: Callable[[NDArray | None], None],
    interleaved: bool,
    by_row: bool,
    backend: str | None,
) -> tuple[DeviceArray, NDArray | None]:
    """As `frameworks.numpy.append`; new keys and values may come from the host."""
    q = _device_array("q", arrays["q"])
    lengths = numpy_arrays.cache_lengths(arrays["cache_seqlens"], q.shape[0])
    if arrays["new_k"] is None:
        if arrays["new_v"] is not None or arrays["rotary_cos"] is not None:
            raise ValueError("v and rotary_cos need k, the new keys, as well")
        return q, lengths
    prepared = dict(arrays, cache_seqlens=lengths)
    for name in ("k", "v"):
        prepared[name] = _device_array(f"{name}_cache", arrays[name])
    for name in ("new_k", "new_v"):
        prepared[name] = DeviceArray(arrays[name]) if isinstance(arrays[name], np.ndarray) else arrays[name]
    for name in ("block_table", "cache_batch_idx"):
        prepared[name] = None if arrays[name] is None else numpy_arrays.table(name, arrays[name])
    used = None if lengths is None else np.asarray(lengths + np.int32(prepared["new_k"].shape[1]), np.int32)
    options = {"interleaved": interleaved, "by_row": by_row}
    adapter = _adapter(q)
    rotated = execute.append(adapter, prepared, check=lambda: check(used), **options, backend=backend or BACKEND)
    return rotated, used


def merge(out_a: DeviceArray, lse_a: NDArray, out_b: DeviceArray, lse_b: NDArray) -> tuple[DeviceArray, NDArray]:
    """See api.merge; by way of the host."""
    out, lse = numpy_arrays.merge(out_a.numpy(), lse_a, out_b.numpy(), lse_b)
    return DeviceArray(out), lse


def prepare(arrays: execute.Arrays, seed: int | None) -> execute.Arrays:
    """The arrays as `execute` wants them."""
    given = dict(zip(INPUTS, arrays, strict=True))
    devices = [_device_array(name, given[name]) for name in ("q", "k", "v")]
    prepared = numpy_arrays.prepare((*[_stand_in(x) for x in devices], *arrays[3:]), seed)
    return (*devices, *prepared[3:])


def _adapter(q: DeviceArray) -> VulkanAdapter:
    return VulkanAdapter(q.describe().device)


def _device_array(name: str, array: Any) -> DeviceArray:
    if not isinstance(array, DeviceArray):
        raise TypeError(f"{name} must be a DeviceArray like q; got {type(array).__name__}")
    return array


def _stand_in(array: DeviceArray) -> NDArray:
    """A host array of that shape and dtype that takes no memory."""
    row = np.zeros(array.shape[-1], array.dtype)
    strides = (*[0] * (array.ndim - 1), array.dtype.itemsize)
    return np.lib.stride_tricks.as_strided(row, array.shape, strides)
