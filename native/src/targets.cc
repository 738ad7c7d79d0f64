#include "targets.h"

#include "target_order.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
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

// The register files that the operating system saves when it switches threads (XCR0).
unsigned saved_state() {
    constexpr unsigned osxsave = 1u << 27;
    if (!all(cpuid(1, 0).ecx, osxsave)) return 0;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

bool system_saves(unsigned state) { return all(saved_state(), state); }

Vendor read_vendor() {
    constexpr unsigned genu = 0x756e6547, auth = 0x68747541;  // GenuineIntel, AuthenticAMD
    const unsigned name = cpuid(0, 0).ebx;
    return name == genu ? Vendor::kIntel : name == auth ? Vendor::kAmd : Vendor::kOther;
}

// The functions below return what a row's instructions lack on this machine, or null.
[[maybe_unused]] const char *missing_avx2() {
    constexpr unsigned fma = 1u << 12, f16c = 1u << 29, avx = 1u << 28, avx2 = 1u << 5;
    constexpr unsigned sse_avx = 0x6;
    if (!all(cpuid(1, 0).ecx, fma | f16c | avx) || !all(cpuid(7, 0).ebx, avx2)) {
        return "the processor has no AVX2, FMA or F16C";
    }
    return system_saves(sse_avx) ? nullptr : "the operating system does not save AVX registers";
}

[[maybe_unused]] const char *missing_avx512() {
    constexpr unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    constexpr unsigned sse_avx_masks_zmm = 0xe6;
    if (const char *missing = missing_avx2()) return missing;
    if (!all(cpuid(7, 0).ebx, f | dq | bw | vl)) return "the processor has no AVX-512 F, DQ, BW or VL";
    return system_saves(sse_avx_masks_zmm) ? nullptr : "the operating system does not save AVX-512 registers";
}

[[maybe_unused]] const char *missing_avx512bf16() {
    constexpr unsigned bf16 = 1u << 5;
    if (const char *missing = missing_avx512()) return missing;
    return all(cpuid(7, 1).eax, bf16) ? nullptr : "the processor has no AVX-512 BF16";
}

[[maybe_unused]] const char *missing_avx512vbmi() {
    constexpr unsigned vbmi = 1u << 1;
    if (const char *missing = missing_avx512bf16()) return missing;
    return all(cpuid(7, 0).ecx, vbmi) ? nullptr : "the processor has no AVX-512 VBMI";
}

// Linux lets a process use tiles after a request. From then on it refuses alternate signal stacks that are too small for
// tiles, so the request is made only when a call needs them. Linux refuses the request while such a stack exists.
[[maybe_unused]] const char *missing_tile_permission() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? nullptr : "Linux refused the use of AMX tiles";
#else
    return "AMX tiles are used on Linux alone";
#endif
}

[[maybe_unused]] const char *missing_avx512amx() {
    if (const char *missing = missing_avx512vbmi()) return missing;
    return missing_tiles(cpuid(7, 0).edx, saved_state(), missing_tile_permission);
}

#else

Vendor read_vendor() { return Vendor::kOther; }

#endif

// Read once, because the cpuid instruction takes microseconds in a virtual machine.
Vendor vendor() {
    static const Vendor known = read_vendor();
    return known;
}

[[maybe_unused]] constexpr const char *missing_nothing() { return nullptr; }

// The function of a row is called once, at first use, because its result does not change.
template <const char *(*missing)()>
const char *once() {
    static const char *const answer = missing();
    return answer;
}

const Kernels *const kernels[] = {
#define ANYATTN_TARGET(name, ...) &kernels_##name,
#include "compiled_targets.def"
#undef ANYATTN_TARGET
};

const TargetRow rows[] = {
#define ANYATTN_TARGET(name, architecture, flags, missing, is_slow, ...) {#name, once<missing>, is_slow},
#include "compiled_targets.def"
#undef ANYATTN_TARGET
};

constexpr int32_t kTargets = sizeof rows / sizeof rows[0];

}  // namespace

const Kernels *target(int32_t index) { return index >= 0 && index < kTargets ? kernels[index] : nullptr; }

bool target_available(int32_t index) { return index >= 0 && index < kTargets && !rows[index].missing(); }

int32_t target_for(int32_t dtype) { return first_choice(rows, kTargets, vendor(), dtype); }

const char *target_reason(int32_t index, int32_t dtype) {
    if (index < 0 || index >= kTargets) return nullptr;
    const int32_t chosen = target_for(dtype);
    if (index == chosen) return nullptr;
    const char *reason = reason_against(rows[index], vendor(), dtype);
    return reason ? reason : "a target before it computes this dtype";
}

}  // namespace anyattn
