"""Values of the four dtypes. NumPy has no bfloat16: such an array is ml_dtypes.bfloat16, or its bits as uint16."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

NDArray = npt.NDArray[Any]

# By the dtype that is computed in: scores below hide a key as -inf does. Times log2(e), as engines keep them, they are.
LOWEST_SCORE = {name: float(np.finfo(name).min) * math.log(2.0) for name in ("float32", "float64")}


def raw(array: NDArray, dtype: str) -> NDArray:
    """The array as `narrow` writes it: a bfloat16 array as its uint16 bits (a view), any other as it is."""
    return array.view(np.uint16) if dtype == "bfloat16" else array


def widen(array: NDArray, dtype: str, to: str = "float64") -> NDArray:
    """The values of an array of `dtype` in the dtype `to`; the array itself if it has that dtype already."""
    if dtype == "bfloat16":
        array = (raw(array, dtype).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return array.astype(to, copy=False)


def narrow(values: NDArray, dtype: str) -> NDArray:
    """The values rounded to `dtype`, nearest and ties to even; bfloat16 as uint16 bits.

    Too large values become infinite, NaN stays NaN. float64 goes to bfloat16 by way of float32, as in ml_dtypes.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return values.astype(dtype, copy=False)
        bits = values.astype(np.float32, copy=False).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)  # rounding could carry a NaN's bits away
    return np.asarray(np.where(np.isnan(values), quiet, rounded))
