// The keys that each query selects (ANYATTN_HAS_KV_INDICES), in the form that kernels read.
#pragma once
#include "anyattn.h"

namespace anyattn {

// Bytes of the sorted lists; 0 for a call without lists.
int64_t key_lists_bytes(const anyattn_call &call);

// Writes the lists into `memory` and returns the call with these for kv_indices. Each list is a count and so many key
// slots: those that are selected and that the interval of the query leaves visible, in ascending order, each once.
// False if the caller's parallel_for did not run every task.
bool sort_key_lists(const anyattn_call &call, int32_t threads, void *memory, anyattn_call *sorted);

// Query row i of sequence b.
struct QueryRow {
    int64_t b, i;
};

// Rows that are allocated to sequences, numbered through.
int64_t query_rows_of(const anyattn_call &call);
QueryRow query_row(const anyattn_call &call, int64_t index);

}  // namespace anyattn
