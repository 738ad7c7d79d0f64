// int8 and float8 as bfloat16, which holds each of these numbers exactly: the bytes of a bfloat16 number are looked up in
// tables of 128 (vpermi2b).
#pragma once
#include <immintrin.h>

#include "load.inl.h"

namespace anyattn {
namespace {

// The bits of digits times 2^exponent, for digits that fit in 8 bits.
constexpr int bfloat16_bits(int digits, int exponent) {
    int top = 7;
    while (top > 0 && digits >> top == 0) --top;
    return digits == 0 ? 0 : ((127 + top + exponent) << 7) + ((digits << (7 - top)) & 0x7f);
}

// Codes 0 to 127 of a dtype. In int8 these are magnitudes, and 0 stands for 128, see WidenedBytes.
constexpr int bfloat16_of_code(int dtype, int code) {
    if (dtype == ANYATTN_INT8) return bfloat16_bits(code ? code : 128, 0);
    const int fraction = dtype == ANYATTN_FLOAT8_E4M3FN ? 3 : 2, bias = fraction == 3 ? 7 : 15;
    const int exponent = code >> fraction, part = code & ((1 << fraction) - 1);
    if (fraction == 2 && code >= 0x7c) return code == 0x7c ? 0x7f80 : 0x7fc0;
    if (fraction == 3 && code == 0x7f) return 0x7fc0;
    return exponent ? bfloat16_bits(part + (1 << fraction), exponent - bias - fraction)
                    : bfloat16_bits(part, 1 - bias - fraction);
}

template <int T>
struct ByteTables {
    alignas(64) uint8_t low[128], high[128];
    constexpr ByteTables() : low(), high() {
        for (int i = 0; i < 128; ++i) {
            low[i] = (uint8_t)(bfloat16_of_code(T, i) & 0xff);
            high[i] = (uint8_t)(bfloat16_of_code(T, i) >> 8);
        }
    }
};

template <int T>
inline constexpr ByteTables<T> kByteTables;

// 64 numbers as the low and the high bytes of bfloat16 numbers.
template <int T>
struct WidenedBytes {
    __m512i low, high;

    ANYATTN_INLINE explicit WidenedBytes(__m512i x) {
        const ByteTables<T> &tables = kByteTables<T>;
        const auto half = [](const uint8_t *table, int i) { return _mm512_load_si512(table + 64 * i); };
        __m512i code = x;
        __mmask64 keep = ~UINT64_C(0);
        if constexpr (T == ANYATTN_INT8) {
            // -128 and 0 have one code; 0 has no bytes but zeros.
            code = _mm512_abs_epi8(x);
            keep = _mm512_test_epi8_mask(x, x);
        }
        low = _mm512_permutex2var_epi8(half(tables.low, 0), code, half(tables.low, 1));
        const __m512i size =
            T == ANYATTN_INT8 ? _mm512_maskz_permutex2var_epi8(keep, half(tables.high, 0), code, half(tables.high, 1))
                              : _mm512_permutex2var_epi8(half(tables.high, 0), code, half(tables.high, 1));
        constexpr int first_or_both = 0xf8;  // a | (b & c)
        high = _mm512_ternarylogic_epi64(size, x, _mm512_set1_epi8((char)0x80), first_or_both);
    }
    // Elements 0 to 7 (8 to 15) of each 16.
    ANYATTN_INLINE __m512i first() const { return _mm512_unpacklo_epi8(low, high); }
    ANYATTN_INLINE __m512i second() const { return _mm512_unpackhi_epi8(low, high); }
};

}  // namespace
}  // namespace anyattn
