#include "../src/target_order.h"

#include <cstring>

#include "check.h"
#include "fixture.h"

using namespace anyattn;

namespace {

const char *nothing() { return nullptr; }
const char *everything() { return "the processor has none of it"; }

int asked = 0;
const char *count_questions() {
    ++asked;
    return nullptr;
}

// The rows of x86-64 on a processor that has all of them.
const TargetRow kAll[] = {
    {"avx512bf16", nothing, slow_pairs}, {"avx512", nothing, never_slow}, {"baseline", nothing, never_slow}};
const TargetRow kNone[] = {
    {"avx512bf16", everything, slow_pairs}, {"avx512", everything, never_slow}, {"baseline", nothing, never_slow}};

bool chooses(const TargetRow (&rows)[3], Vendor vendor, int32_t dtype, const char *name) {
    return !std::strcmp(rows[first_choice(rows, 3, vendor, dtype)].name, name);
}

}  // namespace

TEST(bfloat16_pairs_are_chosen_where_they_are_fast) {
    CHECK(chooses(kAll, Vendor::kAmd, ANYATTN_BFLOAT16, "avx512bf16"));
    CHECK(chooses(kAll, Vendor::kIntel, ANYATTN_BFLOAT16, "avx512"));
    CHECK(chooses(kAll, Vendor::kOther, ANYATTN_BFLOAT16, "avx512bf16"));
    CHECK(reason_against(kAll[0], Vendor::kIntel, ANYATTN_BFLOAT16));
}

TEST(other_dtypes_do_not_depend_on_the_vendor) {
    for (int32_t dtype : {ANYATTN_FLOAT32, ANYATTN_FLOAT16, ANYATTN_FLOAT64}) {
        for (Vendor vendor : {Vendor::kIntel, Vendor::kAmd, Vendor::kOther}) {
            CHECK(chooses(kAll, vendor, dtype, "avx512bf16"));
        }
    }
}

TEST(a_row_that_the_machine_lacks_is_passed_over) {
    for (int32_t dtype : kDtypes) {
        for (Vendor vendor : {Vendor::kIntel, Vendor::kAmd, Vendor::kOther}) {
            CHECK(chooses(kNone, vendor, dtype, "baseline"));
        }
    }
    CHECK(!std::strcmp(reason_against(kNone[0], Vendor::kAmd, ANYATTN_BFLOAT16), "the processor has none of it"));
}

TEST(a_slow_row_is_not_asked_what_it_lacks) {
    const TargetRow row{"avx512bf16", count_questions, slow_pairs};
    CHECK(reason_against(row, Vendor::kIntel, ANYATTN_BFLOAT16) && asked == 0);
    CHECK(!reason_against(row, Vendor::kAmd, ANYATTN_BFLOAT16) && asked == 1);
}

TEST(the_library_gives_a_reason_for_every_other_target) {
    for (int32_t dtype : kDtypes) {
        const int32_t chosen = anyattn_target_for(dtype);
        CHECK(anyattn_target_available(chosen));
        for (int32_t i = 0; anyattn_target_name(i); ++i) {
            const char *reason = anyattn_target_reason(i, dtype);
            CHECK(i == chosen ? !reason : reason && reason[0]);
        }
    }
    CHECK(!anyattn_target_reason(-1, ANYATTN_FLOAT32));
}
