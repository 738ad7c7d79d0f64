// Quantisation of a new key or value: one float32 operation at a time, so that every backend gives the same bits.
#pragma once
#include <cfloat>
#include <cmath>

#include "anyattn.h"
#include "half.h"

namespace anyattn {

// Returns the code of the float8 nearest to `value`, ties to even. |value| must not exceed the largest float8.
template <int Fraction, int Bias>
uint8_t float8_from_float(float value) {
    constexpr int shift = 23 - Fraction;
    const uint32_t bits = bits_of_float(value), size = bits & 0x7fffffff, sign = bits >> 24 & 0x80;
    if (size < (uint32_t(128 - Bias) << 23)) {
        // Below the normal range, the addition rounds to multiples of the smallest number.
        constexpr uint32_t unit = uint32_t(127 + 24 - Bias - Fraction) << 23;
        return static_cast<uint8_t>(sign | (bits_of_float(float_from_bits(size) + float_from_bits(unit)) - unit));
    }
    const uint32_t rounded = size + (1u << (shift - 1)) - 1 + (size >> shift & 1);
    return static_cast<uint8_t>(sign | ((rounded >> shift) - (uint32_t(127 - Bias) << Fraction)));
}

inline uint8_t stored_from_float(float ratio, int32_t dtype) {
    if (dtype == ANYATTN_FLOAT8_E4M3FN) return float8_from_float<3, 7>(ratio);
    if (dtype == ANYATTN_FLOAT8_E5M2) return float8_from_float<2, 15>(ratio);
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23
    const volatile float shifted = ratio + rounder;
    return static_cast<uint8_t>(static_cast<int8_t>(shifted - rounder));
}

inline float largest_stored(int32_t dtype) {
    return dtype == ANYATTN_INT8 ? 127.0f : dtype == ANYATTN_FLOAT8_E4M3FN ? 448.0f : 57344.0f;
}

// Writes n values as `dtype`, and their scale, max |x| / the largest number of the dtype. If the scale is below the
// smallest normal float32, it becomes 0. If a value is NaN or infinite, the scale is NaN. In both cases every stored
// value is 0.
inline void quantise(const float *values, int64_t n, int32_t dtype, char *to, float *scale) {
    const float largest = largest_stored(dtype);
    float top = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
        const float size = std::fabs(values[i]);
        finite = finite && size <= FLT_MAX;
        top = size > top ? size : top;
    }
    const float step = top / largest;
    const bool usable = finite && step >= FLT_MIN;
    *scale = !finite ? float_from_bits(0x7fc00000) : usable ? step : 0;
    for (int64_t i = 0; i < n; ++i) {
        float ratio = usable ? values[i] / step : 0;
        ratio = ratio > largest ? largest : ratio < -largest ? -largest : ratio;
        to[i] = static_cast<char>(stored_from_float(ratio, dtype));
    }
}

}  // namespace anyattn
