"""Keys and values as they are stored: quantised ones are converted in registers, and their scales are factors.

    s_ij = k_scale_j <q_i, k_j>      acc_i += sum_j (p_ij v_scale_j) v_j

Codes are exact numbers of every dtype of q. They are converted by their bits where the hardware has no conversion, and
the dtype of the pointer says how: see `arguments.stored`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED, clamp, dot, load


@triton.jit
def load_stored(
    pointers, keep, dtype: tl.constexpr, MASKED: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Load keys or values like `load`, codes of quantised ones as numbers of dtype."""
    KIND: tl.constexpr = pointers.dtype.element_ty
    if KIND.primitive_bitwidth == 8:
        codes = load(pointers.to(tl.pointer_type(tl.uint8), bitcast=True), keep, MASKED, START, WIDTH, SIZE)
        values = numbers(codes, KIND, dtype)
    else:
        values = load(pointers, keep, MASKED, START, WIDTH, SIZE)
    return values


@triton.jit
def numbers(codes, kind: tl.constexpr, dtype: tl.constexpr):
    """Return the numbers of codes in dtype. uint8 means float8_e4m3fn."""
    if kind == tl.int8:
        values = codes.to(tl.int8, bitcast=True)
        if INTERPRETED:
            values = values.to(tl.float32)
    elif kind == tl.float8e4nv:
        values = codes.to(tl.float8e4nv, bitcast=True)
    elif kind == tl.float8e5:  # a float16 without its last 8 bits
        values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    else:  # the exponent's bias is 7, and 15 in float16
        size = codes.to(tl.uint16) & 0x7F
        bits = ((codes.to(tl.uint16) & 0x80) << 8) | (size << 7)
        values = tl.where(size == 0x7F, float("nan"), bits.to(tl.float16, bitcast=True) * 256.0)
    if values.dtype == tl.float16 and dtype == tl.bfloat16:
        values = values.to(tl.float32)  # sm_7x converts nothing else to bfloat16
    return values.to(dtype)


@triton.jit
def scales(stored, place, row, kv_head, keys, seq):
    """Return the scales of a tile of keys: (1, tile_k), or one number if they have the same."""
    heads = stored.scale + kv_head * stored.scale_head
    if stored.scale_row is None:
        factors = tl.load(heads + seq.index.to(tl.int64) * stored.scale_batch)
    else:
        factors = tl.load(heads + place * stored.scale_batch + row * stored.scale_row, mask=keys, other=0.0)[None, :]
    return factors


@triton.jit
def weigh(p, factors, stored, dtype: tl.constexpr):
    """Return p times the scales of the keys, and a factor of the product of p with keys or values.

    float16 has too few exponents for small scales, so that p is multiplied by their ratios to the largest one.
    """
    top = 1.0
    if dtype == tl.float16:
        if stored.scale_row is None:
            top = factors
        else:
            top = tl.max(factors)
            p = p * tl.where(top > 0, factors / top, factors)
    else:
        p = p * factors
    return p, top


@triton.jit
def add_product(p, values, acc, stored, top, PRECISION: tl.constexpr):
    """Return acc + top p @ values."""
    if stored.scale is not None and p.dtype == tl.float16:
        acc += top * dot(p, values, tl.zeros(acc.shape, tl.float32), PRECISION)
    else:
        acc = dot(p, values, acc, PRECISION)
    return acc


@triton.jit
def quantise(x, kind: tl.constexpr):
    """Return the codes of float32 numbers (rows, dim) as uint8, and their scales (rows,).

    The bits are those of `definition.quantised.quantise`.
    """
    LARGEST: tl.constexpr = 127.0 if kind == tl.int8 else 57344.0 if kind == tl.float8e5 else 448.0
    size = tl.abs(x)
    finite = tl.min((size < float("inf")).to(tl.int32), 1) > 0
    step = tl.div_rn(tl.max(tl.where(finite[:, None], size, 0.0), 1), LARGEST)
    usable = step >= 1.1754943508222875e-38
    ratio = tl.div_rn(x, tl.where(usable, step, 1.0)[:, None])
    ratio = tl.where(usable[:, None], clamp(ratio, -LARGEST, LARGEST), 0.0)
    scale = tl.where(finite, tl.where(usable, step, 0.0), float("nan"))
    if kind == tl.int8:
        codes = (ratio + 12582912.0).to(tl.uint32, bitcast=True)  # 1.5 * 2^23
    elif kind == tl.float8e5:
        codes = float8(ratio, 2, 15)
    else:
        codes = float8(ratio, 3, 7)
    return codes.to(tl.uint8), scale


@triton.jit
def float8(ratio, FRACTION: tl.constexpr, BIAS: tl.constexpr):
    """Return the codes next to float32 numbers that are no larger than the largest, ties to even, in uint32."""
    SHIFT: tl.constexpr = 23 - FRACTION
    UNIT: tl.constexpr = 2.0 ** (24 - BIAS - FRACTION)
    bits = ratio.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    rounded = size + (2 ** (SHIFT - 1) - 1) + ((size >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << FRACTION)
    # Below the normal range: this addition rounds to multiples of the smallest number.
    small = (size.to(tl.float32, bitcast=True) + UNIT).to(tl.uint32, bitcast=True) & (2**SHIFT - 1)
    return tl.where(size < ((128 - BIAS) << 23), small, normal) | ((bits >> 24) & 0x80)
