// Refuses every call that a kernel could not run safely: beyond this point no value is looked at with doubt.
#pragma once
#include "anyattn.h"

namespace anyattn {

// Writes the words into the caller's message and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int32_t
refuse(const anyattn_call &call, int32_t status, const char *format, ...);

// Sizes, scalars and the dtypes that decide about memory. Reads no array and needs none.
int32_t check_sizes(const anyattn_call &call, int32_t pass);
// Arrays of this pass: present, of a dtype that it takes, of strides that stay inside 63 bits.
int32_t check_arrays(const anyattn_call &call, int32_t pass);
// Entries of cu_seqlens, seqused, leftpad, block_table, cache_batch_idx and cache_seqlens.
int32_t check_tables(const anyattn_call &call, int32_t pass);

// Whether a pass computes gradients.
constexpr bool has_gradients(int32_t pass) { return pass == ANYATTN_BACKWARD || pass == ANYATTN_SECOND; }

constexpr int64_t dtype_bytes(int32_t dtype) {
    return dtype == ANYATTN_FLOAT64                                ? 8
           : dtype == ANYATTN_FLOAT32 || dtype == ANYATTN_INT32    ? 4
           : dtype == ANYATTN_FLOAT16 || dtype == ANYATTN_BFLOAT16 ? 2
                                                                   : 1;
}

}  // namespace anyattn
