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

// Rows of x86-64 on a processor that has all of them, and on one that has none.
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
            CHECK(chooses(kAll, vendor, dtype, "avx512"));
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

TEST(tiles_compute_all_dtypes_but_float64) {
    const TargetRow rows[] = {
        {"avx512amx", nothing, no_float64}, {"avx512bf16", nothing, slow_pairs}, {"avx512", nothing, never_slow}};
    for (int32_t dtype : {ANYATTN_BFLOAT16, ANYATTN_FLOAT32, ANYATTN_FLOAT16}) {
        CHECK(chooses(rows, Vendor::kIntel, dtype, "avx512amx"));
    }
    CHECK(chooses(rows, Vendor::kIntel, ANYATTN_FLOAT64, "avx512"));
    const TargetRow refused[] = {
        {"avx512amx", everything, no_float64}, {"avx512bf16", nothing, slow_pairs}, {"avx512", nothing, never_slow}};
    CHECK(chooses(refused, Vendor::kIntel, ANYATTN_BFLOAT16, "avx512"));
}

TEST(emulated_rows_are_never_chosen) {
    const TargetRow rows[] = {{"amx_emulated", nothing, only_named},
                              {"amx_portable", nothing, only_named},
                              {"baseline", nothing, never_slow}};
    for (int32_t dtype : kDtypes) {
        for (Vendor vendor : {Vendor::kIntel, Vendor::kAmd, Vendor::kOther}) {
            CHECK(chooses(rows, vendor, dtype, "baseline"));
        }
    }
}

TEST(permission_is_asked_only_where_processor_and_system_have_tiles) {
    constexpr uint32_t features = 1u << 22 | 1u << 24, saved = 3u << 17;
    asked = 0;
    CHECK(missing_tiles(0, saved, count_questions) && missing_tiles(1u << 24, saved, count_questions));
    CHECK(missing_tiles(features, 0, count_questions) && missing_tiles(features, 1u << 17, count_questions));
    CHECK(asked == 0);
    CHECK(!missing_tiles(features, saved, count_questions) && asked == 1);
    CHECK(!std::strcmp(missing_tiles(features, saved, everything), everything()));
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
