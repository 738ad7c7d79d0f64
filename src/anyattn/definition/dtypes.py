"""The dtypes: one row each, and their values. NumPy has no bfloat16: such an array is ml_dtypes.bfloat16, or its bits
as uint16.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NDArray = npt.NDArray[Any]


class Dtype(NamedTuple):
    """What is known of a dtype, under its NumPy name."""

    itemsize: int
    code: int  # in the C ABI (anyattn.h); 0: no array there has it
    compute: str = ""  # dtype of scores, softmax and sums for q of this dtype; "": q cannot have it
    eps: float = 0.0
    smallest: float = 0.0  # numbers below, times what they are multiplied by, may be flushed to 0
    triton: str = ""


DTYPES = {
    "float32": Dtype(4, 1, "float32", 2.0**-23, 2.0**-120, "fp32"),
    "float16": Dtype(2, 2, "float32", 2.0**-10, 2.0**-24, "fp16"),
    "bfloat16": Dtype(2, 3, "float32", 2.0**-7, 2.0**-120, "bf16"),
    "float64": Dtype(8, 4, "float64", 2.0**-52, 2.0**-1016),
    "bool": Dtype(1, 5, triton="u8"),
    "int32": Dtype(4, 6, triton="i32"),
    "int64": Dtype(8, 0, triton="i64"),
    "uint8": Dtype(1, 0),
}
ATTENTION_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.compute)  # of q


def key_dtypes(q: str) -> tuple[str, ...]:
    """Return the dtypes that k and v may have for q of this dtype."""
    return (q,)


# Scores below this value, by compute dtype, mask their key as -inf does: times log2(e), as kernels keep scores, they
# are -inf.
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
