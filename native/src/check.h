// Refuses every call that a kernel could not run safely. Code after these checks trusts every value.
#pragma once
#include "anyattn.h"

namespace anyattn {

// Writes the text into the caller's message and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int32_t
refuse(const anyattn_call &call, int32_t status, const char *format, ...);

// Checks sizes, scalars and the dtypes that decide about memory. Needs no array.
int32_t check_sizes(const anyattn_call &call, int32_t pass);
// Checks that the arrays of this pass are present, have supported dtypes, and have strides that fit in 63 bits.
int32_t check_arrays(const anyattn_call &call, int32_t pass);
// Checks the entries of cu_seqlens, seqused, leftpad, block_table, cache_batch_idx and cache_seqlens.
int32_t check_tables(const anyattn_call &call, int32_t pass);

// Checks that the operations, registers and arrays of the score program exist.
int32_t check_score_program(const anyattn_call &call, int32_t pass);

// Returns whether a pass computes gradients.
constexpr bool has_gradients(int32_t pass) { return pass == ANYATTN_BACKWARD || pass == ANYATTN_SECOND; }

// Returns whether a pass reads tangents.
constexpr bool has_tangents(int32_t pass) {
    return pass == ANYATTN_TANGENT || pass == ANYATTN_SECOND || pass == ANYATTN_FORWARD_TANGENT;
}

// Whether k and v of this dtype have scales.
constexpr bool is_quantised(int32_t dtype) { return dtype >= ANYATTN_INT8; }

constexpr int64_t dtype_bytes(int32_t dtype) {
    return dtype == ANYATTN_FLOAT64                                ? 8
           : dtype == ANYATTN_FLOAT32 || dtype == ANYATTN_INT32    ? 4
           : dtype == ANYATTN_FLOAT16 || dtype == ANYATTN_BFLOAT16 ? 2
                                                                   : 1;
}

}  // namespace anyattn
