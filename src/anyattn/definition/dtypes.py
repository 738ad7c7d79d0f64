"""Supported dtypes, one row each, and conversion of values.

NumPy has neither bfloat16 nor float8: such an array has a dtype of ml_dtypes, or holds the bits as uint16 or uint8.
"""

from __future__ import annotations

import math
from functools import cache
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
    largest: float = 0.0  # largest finite number of a dtype that stores quantised keys and values; 0: not one of them
    mantissa: int = 0  # bits of a float8
    lowest_exponent: int = 0  # of the normal numbers of a float8


DTYPES = {
    "float32": Dtype(4, 1, "float32", 2.0**-23, 2.0**-120, "fp32"),
    "float16": Dtype(2, 2, "float32", 2.0**-10, 2.0**-24, "fp16"),
    "bfloat16": Dtype(2, 3, "float32", 2.0**-7, 2.0**-120, "bf16"),
    "float64": Dtype(8, 4, "float64", 2.0**-52, 2.0**-1016),
    "bool": Dtype(1, 5, triton="u8"),
    "int32": Dtype(4, 6, triton="i32"),
    "int64": Dtype(8, 0, triton="i64"),
    "uint8": Dtype(1, 0, triton="u8"),
    "int8": Dtype(1, 7, triton="i8", largest=127.0),
    "float8_e4m3fn": Dtype(1, 8, triton="fp8e4nv", largest=448.0, mantissa=3, lowest_exponent=-6),
    "float8_e5m2": Dtype(1, 9, triton="fp8e5", largest=57344.0, mantissa=2, lowest_exponent=-14),
}
ATTENTION_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.compute)  # of q
QUANTISED = tuple(name for name, dtype in DTYPES.items() if dtype.largest)  # of k and v with k_scale and v_scale
FLOAT8 = tuple(name for name, dtype in DTYPES.items() if dtype.mantissa)


def key_dtypes(q: str) -> tuple[str, ...]:
    """Return the dtypes that k and v may have for a q of this dtype."""
    return (q, *QUANTISED)


# Scores below this value (per compute dtype) mask the key, because kernels store scores times log2(e), and such a score
# overflows to -inf.
LOWEST_SCORE = {name: float(np.finfo(name).min) * math.log(2.0) for name in ("float32", "float64")}


def raw(array: NDArray, dtype: str) -> NDArray:
    """Return the array as `narrow` writes it: bfloat16 and float8 as a view of their bits, others unchanged."""
    if dtype == "bfloat16":
        return array.view(np.uint16)
    return array.view(np.uint8) if dtype in FLOAT8 else array


def widen(array: NDArray, dtype: str, to: str = "float64") -> NDArray:
    """Return the values of an array of `dtype` in the dtype `to`; the array itself if it already has that dtype."""
    if dtype == "bfloat16":
        array = (raw(array, dtype).astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype in FLOAT8:
        array = _float8_values(dtype)[raw(array, dtype)]
    with np.errstate(invalid="ignore"):  # signalling NaN
        return array.astype(to, copy=False)


def narrow(values: NDArray, dtype: str) -> NDArray:
    """Return the values rounded to `dtype` (nearest, ties to even); bfloat16 and float8 as their bits.

    Values that are too large become infinite (NaN in float8_e4m3fn, which has no infinity), and NaN stays NaN. float64
    is rounded to bfloat16 through float32, as in ml_dtypes.
    """
    if dtype in FLOAT8:
        return _narrow_float8(values, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return values.astype(dtype, copy=False)
        bits = values.astype(np.float32, copy=False).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)  # rounding could turn NaN into infinity
    return np.asarray(np.where(np.isnan(values), quiet, rounded))


@cache
def _float8_values(dtype: str) -> NDArray:
    """Return the value of each of the 256 codes of a float8 as float32."""
    known = DTYPES[dtype]
    codes = np.arange(128)
    fraction, exponent = codes % 2**known.mantissa, codes >> known.mantissa
    size = np.where(exponent > 0, fraction + 2**known.mantissa, fraction)
    values = np.ldexp(size.astype(np.float32), np.maximum(exponent, 1) - 1 + known.lowest_exponent - known.mantissa)
    values[values > known.largest] = np.nan
    if dtype == "float8_e5m2":
        values[0x7C] = np.inf
    return np.concatenate([values, -values])


def _narrow_float8(values: NDArray, dtype: str) -> NDArray:
    known, positive = DTYPES[dtype], _float8_values(dtype)[:128]
    finite = positive[: np.searchsorted(positive, known.largest) + 1]
    size = np.abs(np.where(np.isfinite(values), values, 0)).astype(np.float64)
    exponent = np.maximum(np.frexp(size)[1] - 1, known.lowest_exponent) - known.mantissa
    rounded = np.ldexp(np.rint(np.ldexp(size, -exponent)), exponent)
    code = np.searchsorted(finite, rounded)
    too_large = np.isinf(values) | (rounded > known.largest)
    special = 0x7C if dtype == "float8_e5m2" else 0x7F
    code = np.where(np.isnan(values), 0x7F, np.where(too_large, special, code)).astype(np.uint8)
    return np.asarray(code | (np.signbit(values).astype(np.uint8) << np.uint8(7)))
