#include "targets.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

namespace anyattn {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Registers {
    unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r{};
    if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return Registers{};
    return r;
}

constexpr bool all(unsigned value, unsigned bits) { return (value & bits) == bits; }

// Whether the operating system saves these register files when it switches threads (XCR0).
bool system_saves(unsigned state) {
    constexpr unsigned osxsave = 1u << 27;
    if (!all(cpuid(1, 0).ecx, osxsave)) return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return all(low, state);
}

[[maybe_unused]] bool has_avx2() {
    constexpr unsigned fma = 1u << 12, f16c = 1u << 29, avx = 1u << 28, avx2 = 1u << 5;
    constexpr unsigned sse_avx = 0x6;
    return all(cpuid(1, 0).ecx, fma | f16c | avx) && all(cpuid(7, 0).ebx, avx2) && system_saves(sse_avx);
}

[[maybe_unused]] bool has_avx512() {
    constexpr unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    constexpr unsigned sse_avx_masks_zmm = 0xe6;
    return has_avx2() && all(cpuid(7, 0).ebx, f | dq | bw | vl) && system_saves(sse_avx_masks_zmm);
}

[[maybe_unused]] bool has_avx512bf16() {
    constexpr unsigned bf16 = 1u << 5;
    return has_avx512() && all(cpuid(7, 1).eax, bf16);
}

#endif

constexpr bool is_always_available() { return true; }

struct Target {
    const Kernels *kernels;
    bool available;
};

// Initialized once, when the library is loaded: the processor does not change.
const Target targets[] = {
#define ANYATTN_TARGET(name, architecture, flags, is_available, ...) {&kernels_##name, is_available()},
#include "compiled_targets.def"
#undef ANYATTN_TARGET
};

constexpr int32_t kTargets = sizeof targets / sizeof targets[0];

}  // namespace

const Kernels *target(int32_t index) { return index >= 0 && index < kTargets ? targets[index].kernels : nullptr; }

bool target_available(int32_t index) { return index >= 0 && index < kTargets && targets[index].available; }

const Kernels *best_target() {
    int32_t index = 0;
    while (!targets[index].available) ++index;
    return targets[index].kernels;
}

}  // namespace anyattn
