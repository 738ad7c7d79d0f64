// Vectors of one instruction set, by the compilers' vector extensions. Its row in targets.def sets their width
// (ANYATTN_VECTOR_BYTES) and the number of vectors that hold the queries of a panel (ANYATTN_PANEL_VECTORS).
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about the undefined operands inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define ANYATTN_INLINE inline __attribute__((always_inline))
#define ANYATTN_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define ANYATTN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ANYATTN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace anyattn {
namespace {

#if defined(__aarch64__)
constexpr bool kIsArm64 = true;  // twice as many vector registers as x86-64 without AVX-512
#else
constexpr bool kIsArm64 = false;
#endif

constexpr int kVectorBytes = ANYATTN_VECTOR_BYTES;
constexpr int kPanelVectors = ANYATTN_PANEL_VECTORS;

template <class C>
struct Lanes;

template <>
struct Lanes<float> {
    static constexpr int count = kVectorBytes / 4;
    typedef float V __attribute__((vector_size(kVectorBytes)));
    typedef int32_t I __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
};

template <>
struct Lanes<double> {
    static constexpr int count = kVectorBytes / 8;
    typedef double V __attribute__((vector_size(kVectorBytes)));
    typedef int64_t I __attribute__((vector_size(kVectorBytes)));
    typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
    typedef float Single __attribute__((vector_size(kVectorBytes / 2)));
    typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
};

using F32 = Lanes<float>::V;
using F64 = Lanes<double>::V;
using U32 = Lanes<float>::U;
using U64 = Lanes<double>::U;

template <class C>
constexpr int lanes = Lanes<C>::count;
// Queries of one panel, which is the width of a register tile.
template <class C>
constexpr int panel = Lanes<C>::count * kPanelVectors;

template <class V>
ANYATTN_INLINE V load(const void *p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// Keeps a vector that is used twice from being loaded twice.
#if defined(__AVX512F__)
template <class V>
ANYATTN_INLINE void in_register(V &x) {
    asm("" : "+v"(x));
}
#else
template <class V>
ANYATTN_INLINE void in_register(V &) {}
#endif

template <class V>
ANYATTN_INLINE void store(void *p, V x) {
    __builtin_memcpy(p, &x, sizeof x);
}

// x - 0 keeps the sign of zero, and compilers see the broadcast in it.
ANYATTN_INLINE F32 splat(float x) { return x - F32{}; }
ANYATTN_INLINE F64 splat(double x) { return x - F64{}; }
ANYATTN_INLINE U32 splat(uint32_t x) { return x - U32{}; }
ANYATTN_INLINE U64 splat(uint64_t x) { return x - U64{}; }

constexpr float infinity(float) { return __builtin_inff(); }
constexpr double infinity(double) { return __builtin_inf(); }

template <class V>
ANYATTN_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

template <class V>
ANYATTN_INLINE V smaller(V a, V b) {
    return a < b ? a : b;
}

template <class V>
ANYATTN_INLINE V absolute(V x) {
    return larger(x, -x);
}

ANYATTN_INLINE F32 copysign(F32 size, F32 sign) {
    const U32 bit = splat(UINT32_C(0x80000000));
    return (F32)(((U32)size & ~bit) | ((U32)sign & bit));
}

ANYATTN_INLINE F64 copysign(F64 size, F64 sign) {
    const U64 bit = splat(UINT64_C(1) << 63);
    return (F64)(((U64)size & ~bit) | ((U64)sign & bit));
}

// The exponent a b of 2 as n + f, with an integer n and f from -0.5 to 0.5. scaled() multiplies by 2^n, or by 0 if the
// exponent is below `lowest`.
#if defined(__AVX512F__)
template <class V>
struct Exponent {
    V x, n, f;
    ANYATTN_INLINE Exponent(V a, V b) : x(a * b), n(nearest(x)), f(x - n) {}
    static ANYATTN_INLINE F32 nearest(F32 x) { return (F32)_mm512_roundscale_ps((__m512)x, 8); }
    static ANYATTN_INLINE F64 nearest(F64 x) { return (F64)_mm512_roundscale_pd((__m512d)x, 8); }
};

ANYATTN_INLINE F32 scaled(F32 p, const Exponent<F32> &e, float lowest) {
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512)e.x, (__m512)splat(lowest), _CMP_NLT_UQ);
    return (F32)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)e.n);
}

ANYATTN_INLINE F64 scaled(F64 p, const Exponent<F64> &e, double lowest) {
    const __mmask8 keep = _mm512_cmp_pd_mask((__m512d)e.x, (__m512d)splat(lowest), _CMP_NLT_UQ);
    return (F64)_mm512_maskz_scalef_pd(keep, (__m512d)p, (__m512d)e.n);
}
#else
// Adding 1.5 * 2^23 (2^52) rounds to an integer, which is then in the low bits: 2^n by a shift into the exponent. The
// product is never needed by itself: where there are fused multiply-adds it takes no instruction, and f no rounding.
ANYATTN_INLINE F32 magic(F32) { return splat(12582912.0f); }
ANYATTN_INLINE F64 magic(F64) { return splat(6755399441055744.0); }
ANYATTN_INLINE F32 power(F32 t) { return (F32)(((U32)t + splat(UINT32_C(127))) << 23); }
ANYATTN_INLINE F64 power(F64 t) { return (F64)(((U64)t + splat(UINT64_C(1023))) << 52); }

template <class V>
struct Exponent {
    V t, n, f;
    ANYATTN_INLINE Exponent(V a, V b) : t(a * b + magic(a)), n(t - magic(a)), f(a * b - n) {}
};

template <class C, class V>
ANYATTN_INLINE V scaled(V p, const Exponent<V> &e, C lowest) {
    return e.n < splat(lowest) ? V{} : p * power(e.t);
}
#endif

// 2^(a b) for a b < 128: 7.9e-8 relative, exactly 0 below about -125 (no subnormals) and for -inf; NaN stays NaN.
ANYATTN_INLINE F32 exp2(F32 a, F32 b = splat(1.0f)) {
    const Exponent<F32> e(a, b);
    F32 p = splat(0.000153458124f);
    p = p * e.f + splat(0.00133999309f);
    p = p * e.f + splat(0.00961848907f);
    p = p * e.f + splat(0.0555032864f);
    p = p * e.f + splat(0.240226462f);
    p = p * e.f + splat(0.693147182f);
    p = p * e.f + splat(1.0f);
    return scaled(p, e, -125.0f);
}

// The same to double precision; 0 below about -1021.
ANYATTN_INLINE F64 exp2(F64 a, F64 b = splat(1.0)) {
    const Exponent<F64> e(a, b);
    F64 p = splat(4.455817908336064493e-10);
    p = p * e.f + splat(7.0741942972885210056e-9);
    p = p * e.f + splat(1.0178057087733941105e-7);
    p = p * e.f + splat(1.3215432535912376166e-6);
    p = p * e.f + splat(1.5252733841556772589e-5);
    p = p * e.f + splat(1.5403530463724354209e-4);
    p = p * e.f + splat(1.3333558146406470697e-3);
    p = p * e.f + splat(9.6181291075872566681e-3);
    p = p * e.f + splat(5.5504108664821627039e-2);
    p = p * e.f + splat(2.4022650695910159567e-1);
    p = p * e.f + splat(6.9314718055994530925e-1);
    p = p * e.f + splat(1.0);
    return scaled(p, e, -1021.0);
}

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;

// 1 / x to about 1e-7 for x of ordinary size.
ANYATTN_INLINE F32 reciprocal(F32 x) {
#if defined(__AVX512F__)
    const F32 r = (F32)_mm512_rcp14_ps((__m512)x);
    return r + r * (splat(1.0f) - x * r);  // one step of Newton; a division costs as much as ten products
#else
    return splat(1.0f) / x;
#endif
}

// x between two limits; NaN stays NaN.
template <class V>
ANYATTN_INLINE V limited(V x, V low, V high) {
    const V above = low > x ? low : x;
    return high < above ? high : above;
}

// x P(x^2) / Q(x^2), minimax on [-9, 9] (2.1e-8 relative); float rounds what is beyond to 1.
ANYATTN_INLINE F32 tanh(F32 x) {
    x = limited(x, splat(-9.0f), splat(9.0f));
    const F32 z = x * x;
    F32 p = splat(1.33554934e-8f);
    p = p * z + splat(2.06097526e-5f);
    p = p * z + splat(3.49563208e-3f);
    p = p * z + splat(1.33810638e-1f);
    p = p * z + splat(0.99999998f);
    F32 q = splat(7.77691915e-7f);
    q = q * z + splat(3.28570439e-4f);
    q = q * z + splat(2.58771529e-2f);
    q = q * z + splat(4.67143795e-1f);
    q = q * z + splat(1.0f);
    return x * p * reciprocal(q);
}

// Polynomials (Cephes) where tanh is nearly x. Elsewhere exp2 is accurate.
ANYATTN_INLINE F64 tanh(F64 x) {
    const F64 size = absolute(x), z = x * x;
    F64 p = splat(-9.64399179425052238628e-1);
    p = p * z + splat(-9.92877231001918586564e1);
    p = p * z + splat(-1.61468768441708447952e3);
    F64 q = z + splat(1.12811678491632931402e2);
    q = q * z + splat(2.23548839060100448583e3);
    q = q * z + splat(4.84406305325125486048e3);
    const F64 near = p / q * z * x + x;
    const F64 limited = size > splat(22.0) ? splat(22.0) : size;
    const F64 e = exp2(limited * splat(2 * kLog2e));
    const F64 far = splat(1.0) - splat(2.0) / (e + splat(1.0));
    return size < splat(0.625) ? near : copysign(far, x);
}

template <class C>
ANYATTN_INLINE C sum_lanes(typename Lanes<C>::V x) {
    C sum = 0;
    for (int i = 0; i < lanes<C>; ++i) sum += x[i];
    return sum;
}

// Whether some lane of a is larger than b's, or NaN.
template <class V>
ANYATTN_INLINE bool any_exceeds(V a, V b) {
    bool all = true;
    for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) all &= a[i] <= b[i];
    return !all;
}
#if defined(__AVX512F__)
ANYATTN_INLINE bool any_exceeds(F32 a, F32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ); }
#endif

// The low (high) halves of a and b, element by element in turn.
template <class V>
ANYATTN_INLINE V interleave_low(V a, V b) {
    constexpr int n = sizeof(V) / sizeof(a[0]);
    if constexpr (n == 2) {
        return __builtin_shufflevector(a, b, 0, 2);
    } else if constexpr (n == 4) {
        return __builtin_shufflevector(a, b, 0, 4, 1, 5);
    } else if constexpr (n == 8) {
        return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    } else {
        return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    }
}

template <class V>
ANYATTN_INLINE V interleave_high(V a, V b) {
    constexpr int n = sizeof(V) / sizeof(a[0]);
    if constexpr (n == 2) {
        return __builtin_shufflevector(a, b, 1, 3);
    } else if constexpr (n == 4) {
        return __builtin_shufflevector(a, b, 2, 6, 3, 7);
    } else if constexpr (n == 8) {
        return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
        return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}

// r[i][j] <-> r[j][i]: each round of interleaving rotates the bits of (row, column) by one.
template <class C>
ANYATTN_INLINE void transpose(typename Lanes<C>::V *r) {
    constexpr int n = lanes<C>;
    typename Lanes<C>::V t[n];
    ANYATTN_UNROLL
    for (int width = 1; width < n; width *= 2) {
        ANYATTN_UNROLL
        for (int i = 0; i < n / 2; ++i) {
            t[2 * i] = interleave_low(r[i], r[i + n / 2]);
            t[2 * i + 1] = interleave_high(r[i], r[i + n / 2]);
        }
        ANYATTN_UNROLL
        for (int i = 0; i < n; ++i) r[i] = t[i];
    }
}

// Products of the low 32 bits of each 64-bit lane with one factor.
ANYATTN_INLINE U64 multiply_wide(U64 a, uint32_t factor) {
#if defined(__AVX512F__)
    return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#elif defined(__AVX2__) && ANYATTN_VECTOR_BYTES == 32
    return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__) && ANYATTN_VECTOR_BYTES == 16
    return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(factor));
#elif defined(__aarch64__) && ANYATTN_VECTOR_BYTES == 16
    return (U64)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(factor));
#else
    return (a & splat(UINT64_C(0xffffffff))) * splat(uint64_t(factor));
#endif
}

}  // namespace
}  // namespace anyattn
