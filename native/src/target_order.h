// Choice of the instruction set for a dtype: the first row of targets.def that is available and not slower than a later
// row on processors of this vendor. The functions take the vendor as an argument, so that tests can try any processor.
#pragma once
#include <cstdint>

#include "anyattn.h"

namespace anyattn {

enum class Vendor { kIntel, kAmd, kOther };

// Returns why a later row is faster for this dtype, or null if no later row is.
using IsSlow = const char *(*)(Vendor vendor, int32_t dtype);

constexpr const char *never_slow(Vendor, int32_t) { return nullptr; }

// vdpbf16ps has twice the rate of float32 FMA on AMD Zen 4 and Zen 5, and half of it on Intel Sapphire and Emerald Rapids.
constexpr const char *slow_pairs(Vendor vendor, int32_t dtype) {
    if (dtype != ANYATTN_BFLOAT16) return "vdpbf16ps multiplies bfloat16 alone";
    return vendor == Vendor::kIntel ? "vdpbf16ps has half the rate of float32 FMA on Intel processors" : nullptr;
}

// Tiles multiply bfloat16 numbers: also the parts of float32 and float16 numbers, but parts of float64 would be too many.
constexpr const char *no_float64(Vendor, int32_t dtype) {
    return dtype == ANYATTN_FLOAT64 ? "its tiles do not multiply float64" : nullptr;
}

constexpr const char *only_named(Vendor, int32_t) { return "it emulates AMX, for tests"; }

// Returns what a machine lacks for tiles, or null. Arguments: CPUID leaf 7 (EDX), XCR0, and a function that requests the
// permission of the operating system, which is called only if everything else is available.
inline const char *missing_tiles(uint32_t features, uint32_t saved, const char *(*missing_permission)()) {
    constexpr uint32_t bf16_and_tile = 1u << 22 | 1u << 24, tile_state = 3u << 17;
    if ((features & bf16_and_tile) != bf16_and_tile) return "the processor has no AMX BF16";
    if ((saved & tile_state) != tile_state) return "the operating system or hypervisor does not save AMX tiles";
    return missing_permission();
}

// Functions of a row that the choice calls. missing: returns what this machine lacks, or null. It is called only for rows
// that are not slow, because it may request a permission of the operating system.
struct TargetRow {
    const char *name;
    const char *(*missing)();
    IsSlow is_slow;
};

// Returns why row `index` does not compute this dtype on this machine, or null if it does.
inline const char *reason_against(const TargetRow &row, Vendor vendor, int32_t dtype) {
    const char *slow = row.is_slow(vendor, dtype);
    return slow ? slow : row.missing();
}

// Returns the index of the row that computes this dtype. The last row must be available and never slow.
inline int32_t first_choice(const TargetRow *rows, int32_t count, Vendor vendor, int32_t dtype) {
    int32_t index = 0;
    while (index < count - 1 && reason_against(rows[index], vendor, dtype)) ++index;
    return index;
}

}  // namespace anyattn
