"""Arrays that stay on a Vulkan device between calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition.problem import Array
from .api import DeviceLost
from .arrays import VECTOR, Region, arranged, rows_region, write
from .engine import Job, current_engine

DTYPES = ("float32", "float16", "bfloat16")
WIDTH_STEP = 8 * VECTOR  # columns, so that every number of lanes per row gives each lane whole vectors


def device_width(columns: int) -> int:
    """Return the number of columns stored for each row of a device array."""
    return -(-columns // WIDTH_STEP) * WIDTH_STEP


class DeviceArray:
    """Array (batch, seqlen, nheads, head_dim), or packed (total, nheads, head_dim), in the memory of a GPU.

    It is made from a NumPy array, which is copied once. `anyattn.attention`, `attention_varlen` and
    `attention_with_kvcache` accept device arrays for q, k, v and the caches. All other arguments are NumPy arrays and
    numbers. out is returned as a device array, and lse as a NumPy array. Appending to a cache happens in place, on the
    device. Gradients are not supported.

    Args:
        values: float32, float16 or bfloat16 (ml_dtypes), with 3 or 4 dimensions.

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions.
        anyattn.backends.vulkan.api.VulkanError: there is no Vulkan device.
        MemoryError: the device has not enough free memory.

    >>> import numpy as np, anyattn
    >>> from anyattn.vulkan import DeviceArray
    >>> x = DeviceArray(np.ones((1, 4, 2, 8), np.float32))  # doctest: +SKIP
    >>> anyattn.attention(x, x, x, causal=True).numpy().shape  # doctest: +SKIP
    (1, 4, 2, 8)
    """

    __anyattn_vulkan__ = True  # recognised by the API without an import

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._allocate(values.shape, values.dtype)

        def upload(job: Job) -> None:
            write(self.region, job.host(self.buffer, self.region.nbytes), arranged("", values))
            job.finish()

        self.engine.run_job(upload)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Return an array of zeros that is made on the device, for example a KV cache.

        Args:
            shape: (batch, seqlen, nheads, head_dim) or (total, nheads, head_dim).
            dtype: float32, float16 or bfloat16 (ml_dtypes).
        """
        made = cls.__new__(cls)
        made._allocate(shape, np.dtype(dtype))

        def clear(job: Job) -> None:
            job.commands.fill(made.buffer, made.region.nbytes, 0)
            job.finish()

        made.engine.run_job(clear)
        return made

    def numpy(self) -> npt.NDArray[Any]:
        """Return a copy in host memory."""
        found = np.empty(self.shape, self.dtype)

        def download(job: Job) -> None:
            self.check(job)
            job.download("", self.buffer, self.region, found)
            job.finish()

        self.engine.run_job(download)
        return found

    def check(self, job: Job) -> None:
        """Raise DeviceLost if the device of this array is no longer in use."""
        if self.engine is not job.engine or self.engine.device.lost:
            raise DeviceLost(
                f"this array was on {self.engine.device.info.name}, which was lost or abandoned. Create it again."
            )

    def describe(self) -> Array:
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return Array(self.shape, tuple(strides), self.dtype.name, f"vulkan:{self.engine.device.info.index}")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def swapaxes(self, first: int, second: int) -> DeviceArray:
        """Raise TypeError, because device arrays have no views. `flash_attention` needs one, `attention` does not."""
        raise TypeError(
            "a DeviceArray has no views. Call attention, whose layout is (batch, seqlen, nheads, head_dim)."
        )

    def __reduce__(self) -> tuple[type[DeviceArray], tuple[npt.NDArray[Any]]]:
        """Pickle and copy through the host. The copy is on the device of the process that loads it."""
        return type(self), (self.numpy(),)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype.name}, on {self.engine.device.info.name})"

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if dtype.name not in DTYPES:
            raise TypeError(f"values must be {', '.join(DTYPES)}, got {dtype.name}.")
        if len(shape) not in (3, 4):
            raise ValueError(f"values must have 3 or 4 dimensions, got {shape}.")
        self.shape, self.dtype = tuple(shape), dtype
        self.engine = current_engine()
        self.region: Region = rows_region(self.shape, dtype.itemsize, device_width(shape[-1]))
        self.buffer = self.engine.run_alone(lambda: self.engine.memory.take(max(self.region.nbytes, 1)))
