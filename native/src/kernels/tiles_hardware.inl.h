// Tile registers of the processor. By inline assembly, because GCC's intrinsics do not tell the compiler which memory they
// read and write.
#pragma once
#include "vector.inl.h"

namespace anyattn {
namespace {
namespace hardware {

struct alignas(64) Configuration {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64, "ldtilecfg reads 64 bytes");

ANYATTN_INLINE void configure() {
    static constexpr Configuration all = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" ::"m"(all) : "memory");
}
ANYATTN_INLINE void release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int T>
ANYATTN_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}

// 16 rows, `stride` bytes apart.
template <int T>
ANYATTN_INLINE void load(const void *p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

// load() with a hint that other tiles are loaded before this one is again.
template <int T>
ANYATTN_INLINE void load_once(const void *p, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

template <int T>
ANYATTN_INLINE void store(void *p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

// C[i][j] += sum over k of A[i][k] B[k][j], for pairs of bfloat16 numbers: of a row in A, of two rows in B.
template <int C, int A, int B>
ANYATTN_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace hardware
}  // namespace
}  // namespace anyattn
