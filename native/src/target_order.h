// Which instruction set computes a dtype: the first row of targets.def that runs here and that no later row outruns on
// processors of this vendor. Pure functions of the vendor, so that the tests can ask about any processor.
#pragma once
#include <cstdint>

#include "anyattn.h"

namespace anyattn {

enum class Vendor { kIntel, kAmd, kOther };

// Why a later row is faster for this dtype; null: no later row is.
using IsSlow = const char *(*)(Vendor vendor, int32_t dtype);

constexpr const char *never_slow(Vendor, int32_t) { return nullptr; }

// vdpbf16ps has twice the rate of float32 FMA on AMD Zen 4 and Zen 5, and half of it on Intel Sapphire and Emerald Rapids.
constexpr const char *slow_pairs(Vendor vendor, int32_t dtype) {
    const bool slow = vendor == Vendor::kIntel && dtype == ANYATTN_BFLOAT16;
    return slow ? "vdpbf16ps has half the rate of float32 FMA on Intel processors" : nullptr;
}

// What the choice needs of a row. missing: what this machine lacks, or null. It is asked only of rows that are not slow,
// because asking may need a permission of the operating system.
struct TargetRow {
    const char *name;
    const char *(*missing)();
    IsSlow is_slow;
};

// Why row `index` does not compute this dtype here; null if it does.
inline const char *reason_against(const TargetRow &row, Vendor vendor, int32_t dtype) {
    const char *slow = row.is_slow(vendor, dtype);
    return slow ? slow : row.missing();
}

// The index of the row that computes this dtype. The last row must be available and never slow.
inline int32_t first_choice(const TargetRow *rows, int32_t count, Vendor vendor, int32_t dtype) {
    int32_t index = 0;
    while (index < count - 1 && reason_against(rows[index], vendor, dtype)) ++index;
    return index;
}

}  // namespace anyattn
