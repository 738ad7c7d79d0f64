"""Supported dtypes, one row each, and conversion of values.

NumPy has no bfloat16: such an array has dtype ml_dtypes.bfloat16, or holds the bits as uint16.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NDArray = npt.NDArray[Any]


class Dtype(NamedTuple):
    """Properties of a dtype, stored under its NumPy name."""

    itemsize: int
    code: int  # in the C ABI (anyattn.h); 0: not used there
    compute: str = ""  # dtype of scores, softmax and sums for q of this dtype; "": not a dtype of q
    eps: float = 0.0
    smallest: float = 0.0  # smaller numbers, and their products, may be flushed to 0
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
    """Return the dtypes that k and v may have for a q of this dtype."""
    return (q,)


# Scores below this value (per compute dtype) mask the key, because kernels store scores times log2(e), and such a score
# overflows to -inf.
LOWEST_SCORE = {name: float(np.finfo(name).min) * math.log(2.0) for name in ("float32", "float64")}


def raw(array: NDArray, dtype: str) -> NDArray:
    """Return the array as `narrow` writes it: bfloat16 as a view of its uint16 bits, any other dtype unchanged."""
    return array.view(np.uint16) if dtype == "bfloat16" else array


def widen(array: NDArray, dtype: str, to: str = "float64") -> NDArray:
    """Return the values of an array of `dtype` in the dtype `to`; the array itself if it already has that dtype."""
    if dtype == "bfloat16":
        array = (raw(array, dtype).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return array.astype(to, copy=False)


def narrow(values: NDArray, dtype: str) -> NDArray:
    """Return the values rounded to `dtype` (nearest, ties to even); bfloat16 as uint16 bits.

    Values that are too large become infinite, and NaN stays NaN. float64 is rounded to bfloat16 through float32, as in
    ml_dtypes.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return values.astype(dtype, copy=False)
        bits = values.astype(np.float32, copy=False).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)  # rounding could turn NaN into infinity
    return np.asarray(np.where(np.isnan(values), quiet, rounded))
