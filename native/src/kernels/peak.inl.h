// How fast this instruction set multiplies and adds at best: independent sums, registers alone. What `bench` divides by.
#pragma once
#include "vector.inl.h"

namespace anyattn {
namespace {

// As many sums as a register tile of the products has.
constexpr int kSums = 6 * kPanelVectors;

// Floating-point operations of n rounds; the sums go to `sink`, so that no compiler drops them.
template <class C>
ANYATTN_NOINLINE double peak_rounds(int64_t n, volatile double *sink) {
    using V = typename Lanes<C>::V;
    const V factor = splat(C(*sink)), term = splat(C(*sink));
    V acc[kSums];
    ANYATTN_UNROLL
    for (int i = 0; i < kSums; ++i) acc[i] = splat(C(i));
    for (int64_t round = 0; round < n; ++round) {
        ANYATTN_UNROLL
        for (int i = 0; i < kSums; ++i) acc[i] = acc[i] * factor + term;
    }
    ANYATTN_UNROLL
    for (int i = 1; i < kSums; ++i) acc[0] += acc[i];
    *sink = double(acc[0][0]);
    return 2.0 * double(n) * kSums * lanes<C>;
}

#if defined(__AVX512BF16__)
ANYATTN_NOINLINE double peak_pairs(int64_t n, volatile double *sink) {
    const __m512bh pairs = (__m512bh)_mm512_set1_epi32(int(*sink));
    __m512 acc[kSums];
    ANYATTN_UNROLL
    for (int i = 0; i < kSums; ++i) acc[i] = _mm512_set1_ps(float(i));
    for (int64_t round = 0; round < n; ++round) {
        ANYATTN_UNROLL
        for (int i = 0; i < kSums; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], pairs, pairs);
    }
    ANYATTN_UNROLL
    for (int i = 1; i < kSums; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    *sink = double(((F32)acc[0])[0]);
    return 4.0 * double(n) * kSums * lanes<float>;
}
#endif

double peak(int32_t dtype, int64_t n, volatile double *sink) {
#if defined(__AVX512BF16__)
    if (dtype == ANYATTN_BFLOAT16) return peak_pairs(n, sink);
#endif
    return dtype == ANYATTN_FLOAT64 ? peak_rounds<double>(n, sink) : peak_rounds<float>(n, sink);
}

}  // namespace
}  // namespace anyattn
