// Conversion of float16, int8 and float8 in memory to vectors of the compute type.
#pragma once
#include "vector.inl.h"

namespace anyattn {
namespace {

using Half = Lanes<float>::Half;

#if defined(__AVX512F__)
ANYATTN_INLINE F32 widen_half(Half bits) { return (F32)_mm512_cvtph_ps((__m256i)bits); }
#elif defined(__F16C__) && ANYATTN_VECTOR_BYTES == 32
ANYATTN_INLINE F32 widen_half(Half bits) { return (F32)_mm256_cvtph_ps((__m128i)bits); }
#elif defined(__aarch64__) && ANYATTN_VECTOR_BYTES == 16
ANYATTN_INLINE F32 widen_half(Half bits) { return (F32)vcvt_f32_f16((float16x4_t)bits); }
#else
ANYATTN_INLINE F32 widen_half(Half bits) {
    const U32 half = __builtin_convertvector(bits, U32);
    const U32 size = half & splat(UINT32_C(0x7fff)), exponent = half & splat(UINT32_C(0x7c00));
    const U32 rebased = (size << 13) + splat(UINT32_C(112) << 23);
    const U32 special = (size << 13) | splat(UINT32_C(0x7f800000));
    const F32 subnormal = __builtin_convertvector((Lanes<float>::I)size, F32) * splat(0x1p-24f);
    const U32 finite = exponent == splat(UINT32_C(0)) ? (U32)subnormal : rebased;
    const U32 widened = exponent == splat(UINT32_C(0x7c00)) ? special : finite;
    return (F32)(widened | (half & splat(UINT32_C(0x8000))) << 16);
}
#endif

ANYATTN_INLINE F32 widen_float16(const char *p) { return widen_half(load<Half>(p)); }

// Sign-extends bytes. Intrinsics are used because compilers split a vector conversion into one conversion per element.
#if defined(__AVX512F__)
ANYATTN_INLINE Half signed_halves(const char *p) { return (Half)_mm256_cvtepi8_epi16(load<__m128i>(p)); }
ANYATTN_INLINE Lanes<float>::I signed_words(const char *p) {
    return (Lanes<float>::I)_mm512_cvtepi8_epi32(load<__m128i>(p));
}
#elif defined(__AVX2__) && ANYATTN_VECTOR_BYTES == 32
ANYATTN_INLINE Half signed_halves(const char *p) {
    return (Half)_mm_cvtepi8_epi16(_mm_cvtsi64_si128(load<int64_t>(p)));
}
ANYATTN_INLINE Lanes<float>::I signed_words(const char *p) {
    return (Lanes<float>::I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(p)));
}
#elif defined(__x86_64__) && ANYATTN_VECTOR_BYTES == 16
ANYATTN_INLINE __m128i signed_low_halves(const char *p) {
    const __m128i bytes = _mm_cvtsi32_si128(load<int32_t>(p));
    return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
ANYATTN_INLINE Half signed_halves(const char *p) { return (Half)_mm_cvtsi128_si64(signed_low_halves(p)); }
ANYATTN_INLINE Lanes<float>::I signed_words(const char *p) {
    const __m128i halves = signed_low_halves(p);
    return (Lanes<float>::I)_mm_srai_epi32(_mm_unpacklo_epi16(halves, halves), 16);
}
#elif defined(__aarch64__) && ANYATTN_VECTOR_BYTES == 16
ANYATTN_INLINE int16x4_t signed_low_halves(const char *p) {
    return vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(load<int32_t>(p)))));
}
ANYATTN_INLINE Half signed_halves(const char *p) { return (Half)signed_low_halves(p); }
ANYATTN_INLINE Lanes<float>::I signed_words(const char *p) { return (Lanes<float>::I)vmovl_s16(signed_low_halves(p)); }
#else
ANYATTN_INLINE Half signed_halves(const char *p) { return __builtin_convertvector(load<Lanes<float>::Bytes>(p), Half); }
ANYATTN_INLINE Lanes<float>::I signed_words(const char *p) {
    return __builtin_convertvector(load<Lanes<float>::Bytes>(p), Lanes<float>::I);
}
#endif

ANYATTN_INLINE F32 widen_int8(const char *p) { return __builtin_convertvector(signed_words(p), F32); }

ANYATTN_INLINE F64 widen_int8_double(const char *p) {
    return __builtin_convertvector(__builtin_convertvector(load<Lanes<double>::Bytes>(p), Lanes<double>::I), F64);
}

// A float8_e5m2 is the upper byte of a float16.
ANYATTN_INLINE F32 widen_float8_e5m2(const char *p) { return widen_half(signed_halves(p) << 8); }

// Widens a float16 whose exponent is smaller by 8, then multiplies by 256. No float32 in between is subnormal, because
// a processor may flush subnormal numbers to 0.
ANYATTN_INLINE F32 widen_float8_e4m3(const char *p) {
    const Half signs = signed_halves(p);  // the upper byte repeats the sign
    const Half size = signs & 0x7f;
    const Half nan = (Half)(size == 0x7f) & 0x7e00;
    return widen_half(((signs << 7) & 0xbf80) | nan) * splat(256.0f);
}

// Widens a float8 with this number of fraction bits: an integer times a power of two, both exact.
template <int Fraction, int Bias>
ANYATTN_INLINE F64 widen_float8(const char *p) {
    using I = Lanes<double>::I;
    const I code = __builtin_convertvector(load<Lanes<double>::Bytes>(p), I), size = code & 0x7f;
    const I exponent = size >> Fraction, fraction = size & ((1 << Fraction) - 1);
    const I digits = exponent > 0 ? fraction + (1 << Fraction) : fraction;
    const I power = (exponent > 0 ? exponent : exponent + 1) + (1023 - Bias - Fraction);
    F64 value = __builtin_convertvector(digits, F64) * (F64)(power << 52);
    if constexpr (Fraction == 2) value = size == 0x7c ? value * splat(infinity(0.0)) : value;
    value = size > (Fraction == 2 ? 0x7c : 0x7e) ? splat(infinity(0.0)) - splat(infinity(0.0)) : value;
    return code < 0 ? -value : value;
}

}  // namespace
}  // namespace anyattn
