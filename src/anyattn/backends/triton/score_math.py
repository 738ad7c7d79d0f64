"""Device functions for operations of score functions that differ from Triton's operators, or that Triton lacks.

Every function takes tensors of any shapes that broadcast. Integers are int32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .tiles import INTERPRETED


@triton.jit
def spread(x, q_idx):
    """Return a number as it is; in the interpreter, which gives comparisons of scalars a wrong type, as a tensor."""
    if INTERPRETED:
        x = (q_idx * 0 + 1) * x
    return x


@triton.jit
def read(pointer, index, size):
    """Return pointer[index]; 0 for an index outside the array, which only pairs outside the sequence have."""
    return tl.load(pointer + index, mask=(index >= 0) & (index < size), other=0)


@triton.jit
def place(index, start, size):
    """Return the place of array[index] among all captured arrays, which starts at `start`; -1 for an index outside."""
    return tl.where((index >= 0) & (index < size), start + index, -1)


@triton.jit
def floor_divide(a, b):
    """Return a // b of integers, rounded down; 0 for b = 0."""
    divisor = tl.where(b == 0, 1, b)
    remainder = modulo(a, divisor)
    return tl.where(b == 0, 0, (a - remainder) // divisor)


@triton.jit
def modulo(a, b):
    """Return a mod b of integers with the sign of b; 0 for b = 0. Triton's % has the sign of a on a GPU."""
    divisor = tl.where(b == 0, 1, b)
    rest = a % divisor
    moved = tl.where((rest != 0) & ((rest < 0) != (divisor < 0)), rest + divisor, rest)
    return tl.where(b == 0, 0, moved)


@triton.jit
def floor_divide_float(a, b):
    """Return a // b, rounded down, from the exact remainder as NumPy does."""
    quotient = (a - modulo_float(a, b)) / b
    whole = tl.floor(quotient)
    whole = tl.where(quotient - whole > 0.5, whole + 1.0, whole)
    return tl.where(b == 0.0, a / b, whole)


@triton.jit
def modulo_float(a, b):
    """Return a mod b with the sign of b."""
    rest = a % b
    return tl.where((rest != 0.0) & ((rest < 0.0) != (b < 0.0)), rest + b, rest)


@triton.jit
def round_even(x):
    """Round to the nearest integer, ties to even. Numbers from 2^23 on are integers."""
    shift = tl.where(x < 0.0, -8388608.0, 8388608.0)
    return tl.where(tl.abs(x) < 8388608.0, (x + shift) - shift, x)


@triton.jit
def truncate(x):
    """Round towards zero to int32, clamped to its range; NaN becomes 0."""
    inside = tl.minimum(tl.maximum(x, -2147483648.0), 2147483520.0)
    return tl.where(x == x, inside, 0.0).to(tl.int32)  # noqa: PLR0124 (NaN)


@triton.jit
def sign(x):
    """Return -1, 0 or 1; NaN stays."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def sign_int(x):
    return tl.where(x > 0, 1, tl.where(x < 0, -1, 0))


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def chain(ds, slope):
    """Return ds times a derivative; 0 where ds is 0, even if the derivative is infinite or NaN."""
    return tl.where(ds == 0.0, 0.0, ds * slope)


@triton.jit
def power(a, b):
    """Return a^b. The interpreter has no such function, and computes it from the logarithm."""
    if INTERPRETED:
        size = tl.exp2(b * tl.log2(tl.abs(a)))
        whole = tl.floor(b) == b
        odd = whole & (tl.floor(b * 0.5) * 2.0 != b)
        found = tl.where(odd & (a < 0.0), -size, size)
        found = tl.where((a < 0.0) & (whole == 0), float("nan"), found)
        found = tl.where((b == 0.0) | (a == 1.0), 1.0, found)
    else:
        found = libdevice.pow(a, b)
    return found


# Functions that the generated source calls by name.
FUNCTIONS = (
    *(
        "spread",
        "read",
        "place",
        "floor_divide",
        "modulo",
        "floor_divide_float",
        "modulo_float",
        "round_even",
        "truncate",
    ),
    *("sign", "sign_int", "sigmoid", "power", "chain"),
)
