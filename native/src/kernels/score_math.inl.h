// Functions of score programs for every argument, with the special values of IEEE 754 and the rules of the definition.
#pragma once
#include "vector.inl.h"

namespace anyattn {
namespace {

using I32 = Lanes<float>::I;
using I64 = Lanes<double>::I;

// 2.0 x 10^9 does not fit float: integers are splat as integers.
ANYATTN_INLINE I32 splat(int32_t x) { return (I32)splat((uint32_t)x); }
ANYATTN_INLINE I64 splat(int64_t x) { return (I64)splat((uint64_t)x); }

// mask ? a : b, bit by bit.
template <class T, class I>
ANYATTN_INLINE T select(I mask, T a, T b) {
    return (T)((mask & (I)a) | (~mask & (I)b));
}

// f of every lane, one after the other.
template <class V, class F>
ANYATTN_INLINE V each(V x, const F &f) {
    for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = f(x[i]);
    return x;
}

template <class V, class F>
ANYATTN_INLINE V each(V x, V y, const F &f) {
    for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = f(x[i], y[i]);
    return x;
}

ANYATTN_INLINE F32 magnitude(F32 x) { return (F32)((U32)x & splat(UINT32_C(0x7fffffff))); }
ANYATTN_INLINE F64 magnitude(F64 x) { return (F64)((U64)x & splat(~(UINT64_C(1) << 63))); }

template <class V>
ANYATTN_INLINE V sign(V x) {
    const V none{};
    return x > none ? none + 1 : x < none ? none - 1 : x;
}

// NaN if one argument is NaN.
template <class V>
ANYATTN_INLINE V minimum(V a, V b) {
    return a != a ? a : a < b ? a : b;
}

template <class V>
ANYATTN_INLINE V maximum(V a, V b) {
    return a != a ? a : a > b ? a : b;
}

// Numbers from these on are integers.
ANYATTN_INLINE F32 first_integer(F32) { return splat(8388608.0f); }
ANYATTN_INLINE F64 first_integer(F64) { return splat(4503599627370496.0); }

// To the nearest integer, ties to even: the sum with the first number whose neighbours are integers is rounded so.
template <class V>
ANYATTN_INLINE V nearest(V x) {
    const V large = first_integer(x), size = magnitude(x);
    const V rounded = copysign((size + large) - large, x);
    return size < large ? rounded : x;
}

template <class V>
ANYATTN_INLINE V round_down(V x) {
    const V near = nearest(x), none{};
    return copysign(near > x ? near - (none + 1) : near, x);
}

// The low and high half of the digits of ln 2: multiples of the first by small integers are exact.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

ANYATTN_INLINE F32 power_of_2(I32 n) { return (F32)((n + splat(INT32_C(127))) << 23); }

ANYATTN_INLINE F32 exponential(F32 x) {
    const F32 y = limited(x, splat(-105.0f), splat(89.0f));  // beyond: 0 and infinity
    const F32 n = nearest(y * splat(float(kLog2e)));
    const F32 f = (y - n * splat(kLn2High)) - n * splat(kLn2Low);
    F32 p = splat(1.9875691500e-4f);
    p = p * f + splat(1.3981999507e-3f);
    p = p * f + splat(8.3334519073e-3f);
    p = p * f + splat(4.1665795894e-2f);
    p = p * f + splat(1.6666665459e-1f);
    p = p * f + splat(5.0000001201e-1f);
    p = p * (f * f) + f + splat(1.0f);
    const I32 power = __builtin_convertvector(n == n ? n : F32{}, I32), half = power >> 1;
    return p * power_of_2(half) * power_of_2(power - half);
}

// Cephes: x = 2^e m, m from sqrt(1/2) to sqrt(2).
ANYATTN_INLINE F32 logarithm(F32 x) {
    const F32 one = splat(1.0f), least = splat(__FLT_MIN__);
    const F32 normal = x < least ? x * first_integer(x) : x;
    const U32 bits = (U32)normal;
    F32 e = __builtin_convertvector((I32)(bits >> 23), F32) - (x < least ? splat(126.0f + 23.0f) : splat(126.0f));
    F32 m = (F32)((bits & splat(UINT32_C(0x7fffff))) | splat(UINT32_C(0x3f000000)));
    const I32 small = (I32)(m < splat(0.707106781186547524f));
    e = small ? e - one : e;
    m = (small ? m + m : m) - one;
    const F32 z = m * m;
    F32 p = splat(7.0376836292e-2f);
    p = p * m + splat(-1.1514610310e-1f);
    p = p * m + splat(1.1676998740e-1f);
    p = p * m + splat(-1.2420140846e-1f);
    p = p * m + splat(1.4249322787e-1f);
    p = p * m + splat(-1.6668057665e-1f);
    p = p * m + splat(2.0000714765e-1f);
    p = p * m + splat(-2.4999993993e-1f);
    p = p * m + splat(3.3333331174e-1f);
    p = p * m * z + e * splat(kLn2Low) - z * splat(0.5f);
    const F32 found = m + p + e * splat(kLn2High), none{};
    const F32 special = x == none ? splat(-infinity(0.0f)) : x == splat(infinity(0.0f)) ? x : splat(__builtin_nanf(""));
    return x > none && x < splat(infinity(0.0f)) ? found : special;
}

ANYATTN_INLINE F64 exponential(F64 x) {
    return each(x, [](double a) { return __builtin_exp(a); });
}
ANYATTN_INLINE F64 logarithm(F64 x) {
    return each(x, [](double a) { return __builtin_log(a); });
}

// The sine or the cosine. Cephes: x = j pi/2 + f, |f| <= pi/4; f in double, because the difference cancels.
template <bool cosine>
ANYATTN_INLINE F32 wave(F32 x) {
    typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
    if (any_exceeds(magnitude(x), splat(1e5f))) {
        return each(x, [](float a) { return cosine ? __builtin_cosf(a) : __builtin_sinf(a); });
    }
    const Wide wide = __builtin_convertvector(x, Wide), magic = Wide{} + 6755399441055744.0;
    const Wide j = (wide * (Wide{} + 0.63661977236758134308) + magic) - magic;
    const Wide rest = (wide - j * (Wide{} + 1.57079632679489655800)) - j * (Wide{} + 6.1232339957367660359e-17);
    const F32 f = __builtin_convertvector(rest, F32), z = f * f;
    const I32 quarter = __builtin_convertvector(j, I32) + splat(INT32_C(1)) * (cosine ? 1 : 0);
    F32 p = splat(-1.9515295891e-4f);
    p = p * z + splat(8.3321608736e-3f);
    p = p * z + splat(-1.6666654611e-1f);
    const F32 sine = p * z * f + f;
    F32 q = splat(2.443315711809948e-5f);
    q = q * z + splat(-1.388731625493765e-3f);
    q = q * z + splat(4.166664568298827e-2f);
    const F32 other = q * z * z - splat(0.5f) * z + splat(1.0f);
    const I32 one = splat(INT32_C(1)), two = splat(INT32_C(2));
    const F32 size = (quarter & one) == one ? other : sine;
    return (quarter & two) == two ? -size : size;
}

template <bool cosine>
ANYATTN_INLINE F64 wave(F64 x) {
    return each(x, [](double a) { return cosine ? __builtin_cos(a) : __builtin_sin(a); });
}

ANYATTN_INLINE F32 square_root(F32 x) {
#if defined(__AVX512F__)
    return (F32)_mm512_sqrt_ps((__m512)x);
#else
    return each(x, [](float a) { return __builtin_sqrtf(a); });
#endif
}
ANYATTN_INLINE F64 square_root(F64 x) {
    return each(x, [](double a) { return __builtin_sqrt(a); });
}

ANYATTN_INLINE F32 raise_to(F32 x, F32 y) {
    return each(x, y, [](float a, float b) { return __builtin_powf(a, b); });
}
ANYATTN_INLINE F64 raise_to(F64 x, F64 y) {
    return each(x, y, [](double a, double b) { return __builtin_pow(a, b); });
}

template <class V>
ANYATTN_INLINE V sigmoid(V x) {
    const V none{}, one = none + 1, small = exponential(-magnitude(x));
    return (x < none ? small : one) / (one + small);
}

template <class C>
C remainder_of(C a, C b) {
    return sizeof(C) == 4 ? C(__builtin_fmodf(float(a), float(b))) : C(__builtin_fmod(double(a), double(b)));
}

// The remainder has the sign of the divisor.
template <class C>
C modulo(C a, C b) {
    const C r = remainder_of(a, b);
    if (b == 0) return r;
    if (r == 0) return b < 0 ? -C(0) : C(0);
    return (r < 0) != (b < 0) ? r + b : r;
}

// The quotient rounded down, from an exact remainder.
template <class C>
C floor_quotient(C a, C b) {
    if (b == 0) return a / b;
    const C r = remainder_of(a, b), q = (a - r) / b, down = r != 0 && (r < 0) != (b < 0) ? q - 1 : q;
    if (down == 0) return a / b < 0 ? -C(0) : C(0);
    const C whole = C(__builtin_floor(double(down)));
    return down - whole > C(0.5) ? whole + 1 : whole;
}

// a / b rounded down; 0 for b = 0. Quotients of 32-bit integers in double are exact enough.
ANYATTN_INLINE I32 divide_down(I32 a, I32 b) {
    typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
    const I32 none{};
    const I32 zero = (I32)(b == none);
    const Wide q = __builtin_convertvector(a, Wide) / __builtin_convertvector(b - zero, Wide);
    const I32 towards_zero = __builtin_convertvector(q, I32);
    const I32 down = towards_zero + __builtin_convertvector(__builtin_convertvector(towards_zero, Wide) > q, I32);
    return down & ~zero;
}

ANYATTN_INLINE I64 divide_down(I64 a, I64 b) {
    return each(a, b, [](int64_t x, int64_t y) {
        if (y == 0) return INT64_C(0);
        if (y == -1) return (int64_t)-(uint64_t)x;
        return x / y - (x % y != 0 && (x < 0) != (y < 0));
    });
}

// Towards zero, within int32; NaN gives 0.
template <class I, class V>
ANYATTN_INLINE I truncate(V x) {
    const V low = V{} - 2147483648.0, high = V{} + 2147483648.0;
    const V inside = x == x ? (x < low ? low : x < high ? x : V{}) : V{};
    return select((I)(x >= high), I{} + INT32_MAX, __builtin_convertvector(inside, I));
}

// Shifts by more than 31 are shifts by 31.
template <class I>
ANYATTN_INLINE I shift_count(I n) {
    const I none{}, most = none + 31;
    const I low = n < none ? none : n;
    return low > most ? most : low;
}

}  // namespace
}  // namespace anyattn
