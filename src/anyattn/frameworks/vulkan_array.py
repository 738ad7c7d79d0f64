"""Framework for arrays on a Vulkan device. Only q, k, v and caches are on the device; other arrays are on the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.base import Call
from ..backends.vulkan.device_array import DeviceArray
from ..definition.inputs import Appended, Gradients, Inputs, Saved, SecondGradients, Tangents
from ..definition.options import Options, Rotation
from ..definition.passes import FORWARD
from ..definition.problem import Array
from ..runtime import dispatch, execute
from . import numpy as numpy_arrays
from .score_arguments import ATTENTION, ScoreFunctions, Use, with_traced
from .score_arguments import Call as ReplacedCall
from .score_functions import trace_numpy
from .scores import Stage

NDArray = npt.NDArray[Any]
BACKEND = "vulkan"


class VulkanAdapter:
    """Adapter for device arrays and for the host arrays that accompany them, which count as being on the device."""

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
        raise TypeError("a DeviceArray has no host address.")

    def numpy(self, array: Any) -> NDArray:
        return array.numpy() if isinstance(array, DeviceArray) else numpy_arrays.adapter.numpy(array)

    def tables_on_host(self, device: str) -> bool:
        return True


def attention(
    inputs: Inputs,
    options: Options,
    seed: int | None,
    return_lse: bool,
    backend: str | None,
    *,
    want_lse: bool = False,
) -> tuple[DeviceArray, NDArray]:
    return forward(numpy_arrays.with_state(inputs, options, seed), options, seed, backend)


def forward(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> tuple[DeviceArray, NDArray]:
    """Return (out, lse): out on the device, lse in host memory."""
    prepared = prepare(inputs, seed)
    adapter = _adapter(prepared.q)
    ready = execute.find(adapter, FORWARD, prepared, options, backend or BACKEND)
    shapes = {name: shape for name, shape, _ in ready.outputs}
    out = DeviceArray.zeros(shapes["out"], prepared.q.dtype)
    call = Call(adapter, prepared, out=out, lse=np.empty(shapes["lse"], np.float32))
    execute.run(ready, call)
    return call.out, call.lse


def backward(saved: Saved, inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> Gradients:
    raise TypeError("q must be a NumPy array or a torch tensor for gradients, got DeviceArray. Pass q.numpy().")


def tangent(
    out: Any, lse: Any, tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> tuple[Any, Any]:
    raise TypeError("q must be a NumPy array or a torch tensor here, got DeviceArray. Pass q.numpy(), k.numpy().")


def forward_tangent(
    tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> tuple[Any, Any, Any, Any]:
    raise TypeError("q must be a NumPy array or a torch tensor here, got DeviceArray. Pass q.numpy(), k.numpy().")


def second(
    saved: Saved, tangents: Tangents, inputs: Inputs, options: Options, seed: int | None, backend: str | None
) -> SecondGradients:
    raise TypeError("q must be a NumPy array or a torch tensor here, got DeviceArray. Pass q.numpy(), k.numpy().")


def scores(inputs: Inputs, options: Options, queries: Any, stage: Stage, lse: Any = None) -> Any:
    raise TypeError("q must be a NumPy array or a torch tensor here, got DeviceArray. Pass q.numpy(), k.numpy().")


def explain(inputs: Inputs, options: Options, seed: int | None, backend: str | None) -> dispatch.Explanation:
    prepared = prepare(inputs, seed)
    return execute.explain(_adapter(prepared.q), prepared, options, backend or BACKEND)


def warmup(inputs: Inputs, options: Options, seed: int | None, backend: str | None, *, backward: bool) -> None:
    if backward:
        raise TypeError("q must be a NumPy array or a tensor for gradients, got DeviceArray. Pass backward=False.")
    prepared = prepare(inputs, seed)
    execute.warmup(_adapter(prepared.q), prepared, options, backend or BACKEND, backward=False)


def check(inputs: Inputs, options: Options, backend: str | None) -> None:
    prepared = prepare(inputs, None)
    execute.check(_adapter(prepared.q), prepared, options, backend or BACKEND)


def append(
    arrays: Appended, rotation: Rotation, backend: str | None, *, check: Callable[[NDArray | None], None]
) -> tuple[DeviceArray, NDArray | None]:
    """Append to the cache on the device in place. New keys and values may be host arrays."""
    q = _device_array("q", arrays.q)
    lengths = numpy_arrays.cache_lengths(arrays.cache_seqlens, q.shape[0])
    if arrays.new_k is None:
        numpy_arrays.check_no_new_keys(arrays)
        return q, lengths
    prepared = arrays._replace(
        k=_device_array("k_cache", arrays.k),
        v=_device_array("v_cache", arrays.v),
        new_k=_from_host(arrays.new_k),
        new_v=_from_host(arrays.new_v),
        cache_seqlens=lengths,
        cache_batch_idx=_table("cache_batch_idx", arrays.cache_batch_idx),
        block_table=_table("block_table", arrays.block_table),
    )
    used = numpy_arrays.keys_in_use(lengths, prepared.new_k)
    rotated = execute.append(_adapter(q), prepared, rotation, backend or BACKEND, check=lambda: check(used))
    return rotated, used


def _from_host(array: Any) -> Any:
    return DeviceArray(array) if isinstance(array, np.ndarray) else array


def _table(name: str, array: Any) -> Any:
    return None if array is None else numpy_arrays.table(name, array)


def merge(out_a: DeviceArray, lse_a: NDArray, out_b: DeviceArray, lse_b: NDArray) -> tuple[DeviceArray, NDArray]:
    """Merge two results on the host; see explicit.merge."""
    out, lse = numpy_arrays.merge(out_a.numpy(), lse_a, out_b.numpy(), lse_b)
    return DeviceArray(out), lse


def attention_with_functions(
    inputs: Inputs, options: Options, functions: ScoreFunctions, seed: int | None, return_lse: bool, backend: str | None
) -> tuple[Any, Any]:
    call = with_functions(inputs, options, *functions, ATTENTION)
    return call.results(*attention(call.inputs, call.options, seed, return_lse, backend))


def with_functions(inputs: Inputs, options: Options, score_mod: Any, mask_mod: Any, use: Use) -> ReplacedCall:
    """Return a call with functions that read NumPy arrays. Its queries and keys stay as they are on the device."""
    traced = trace_numpy(score_mod, mask_mod, _device_array("q", inputs.q), use.captured_gradients)
    return with_traced(traced, inputs, options, use._replace(reshapes=False))


def prepare(inputs: Inputs, seed: int | None) -> Inputs:
    """Return the arrays as `execute` needs them."""
    q, k, v = (_device_array(name, getattr(inputs, name)) for name in ("q", "k", "v"))
    host = numpy_arrays.prepare(Inputs(_stand_in(q), _stand_in(k), _stand_in(v), inputs.extras), seed)
    return host._replace(q=q, k=k, v=v)


def _adapter(q: DeviceArray) -> VulkanAdapter:
    return VulkanAdapter(q.describe().device)


def _device_array(name: str, array: Any) -> DeviceArray:
    if not isinstance(array, DeviceArray):
        raise TypeError(f"{name} must be a DeviceArray like q, got {type(array).__name__}.")
    return array


def _stand_in(array: DeviceArray) -> NDArray:
    """Return a host array of that shape and dtype that needs no memory."""
    row = np.zeros(array.shape[-1], array.dtype)
    strides = (*[0] * (array.ndim - 1), array.dtype.itemsize)
    return np.lib.stride_tricks.as_strided(row, array.shape, strides)
