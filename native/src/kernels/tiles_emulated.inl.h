// Tile registers in memory, with the results of the hardware bit by bit (measured on Emerald Rapids: 2.3 million results
// of 8 kinds of data). multiply(): of each element, the even and the odd products are summed from zero by fused
// multiply-adds, the two sums are added, and that is added to C. Each step rounds to nearest; denormals are zeros as
// input and as output; the floating-point control state is ignored.
#pragma once
#include "vector.inl.h"

namespace anyattn {
namespace {
namespace emulated {

using Tile = uint32_t[16][16];

struct File {
    Tile tiles[8];
};

inline File &file() {
    static thread_local File f;
    return f;
}

inline float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float flushed(float x) {
    const uint32_t bits = to_bits(x);
    return (bits & 0x7f800000u) == 0 ? from_bits(bits & 0x80000000u) : x;
}

// The sum of two numbers, rounded to odd: rounded to float then, it is rounded as the exact sum would be.
inline double odd_sum(double a, double b) {
    double sum = a + b;
    const double back = sum - a, error = (a - (sum - back)) + (b - back);
    uint64_t bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    if (error != 0 && (bits & 1) == 0) {
        bits += (error > 0) == (sum > 0) ? 1 : ~UINT64_C(0);
        __builtin_memcpy(&sum, &bits, sizeof sum);
    }
    return sum;
}

// a b + c in plain C++. The product of two bfloat16 numbers is exact in double.
inline float multiply_add(float a, float b, float c) {
    if (a != a || b != b || c != c) return from_bits(to_bits(a != a ? a : b != b ? b : c) | 0x00400000u);
    const double product = double(a) * double(b), plain = product + double(c);
    if (plain != plain) return from_bits(0xffc00000u);  // infinity minus infinity, or 0 times infinity
    const double sum = plain - plain == 0 ? odd_sum(product, double(c)) : plain;
    const double size = sum < 0 ? -sum : sum;
    // Tiny numbers are rounded as if the exponent had no limit, and then flushed to zero if they are still too small.
    if (size != 0 && size < 0x1.fffffep-127) return sum < 0 ? -0.0f : 0.0f;
    if (size < 0x1p-126 && size != 0) return flushed(float(double(float(sum * 0x1p64)) * 0x1p-64));
    return flushed(float(sum));
}

inline float number(uint32_t bits) { return flushed(from_bits(bits)); }

[[maybe_unused]] ANYATTN_NOINLINE void multiply_plain(Tile &c, const Tile &a, const Tile &b) {
    for (int i = 0; i < 16; ++i) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < 16; ++k) {
            const float a0 = number(a[i][k] << 16), a1 = number(a[i][k] & 0xffff0000u);
            for (int j = 0; j < 16; ++j) {
                even[j] = multiply_add(a0, number(b[k][j] << 16), even[j]);
                odd[j] = multiply_add(a1, number(b[k][j] & 0xffff0000u), odd[j]);
            }
        }
        for (int j = 0; j < 16; ++j) {
            const float sum = multiply_add(even[j], 1.0f, odd[j]);
            c[i][j] = to_bits(multiply_add(sum, 1.0f, number(c[i][j])));
        }
    }
}

#if defined(__AVX512F__)
// Vector code that computes the same steps while denormals are flushed and sums are rounded to nearest.
ANYATTN_NOINLINE void multiply_flushed(Tile &c, const Tile &a, const Tile &b) {
    for (int i = 0; i < 16; ++i) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < 16; ++k) {
            const U32 words = anyattn::load<U32>(b[k]), high = splat(UINT32_C(0xffff0000));
            const U32 pair = splat(a[i][k]);
            even = _mm512_fmadd_ps((__m512)(pair << 16), (__m512)(words << 16), even);
            odd = _mm512_fmadd_ps((__m512)(pair & high), (__m512)(words & high), odd);
        }
        const __m512 sum = _mm512_add_ps(even, odd);
        anyattn::store(c[i], _mm512_add_ps(anyattn::load<__m512>(c[i]), sum));
    }
}

inline void multiply_vectors(Tile &c, const Tile &a, const Tile &b) {
    uint32_t before;
    const uint32_t flush_to_nearest = 0x1f80 | 0x8040;
    __asm__ volatile("stmxcsr %0" : "=m"(before)::"memory");
    __asm__ volatile("ldmxcsr %0" ::"m"(flush_to_nearest) : "memory");
    multiply_flushed(c, a, b);
    __asm__ volatile("ldmxcsr %0" ::"m"(before) : "memory");
}
#else
inline void multiply_vectors(Tile &c, const Tile &a, const Tile &b) { multiply_plain(c, a, b); }
#endif

inline void configure() { __builtin_memset(&file(), 0, sizeof(File)); }
inline void release() {}

template <int T>
void zero() {
    __builtin_memset(file().tiles[T], 0, sizeof(Tile));
}

template <int T>
void load(const void *p, int64_t stride) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(file().tiles[T][i], static_cast<const char *>(p) + i * stride, 64);
}

template <int T>
void load_once(const void *p, int64_t stride) {
    load<T>(p, stride);
}

template <int T>
void store(void *p, int64_t stride) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(static_cast<char *>(p) + i * stride, file().tiles[T][i], 64);
}

template <int C, int A, int B>
void multiply() {
    multiply_vectors(file().tiles[C], file().tiles[A], file().tiles[B]);
}

}  // namespace emulated
}  // namespace
}  // namespace anyattn
