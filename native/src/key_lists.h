// Lists of the keys that each query selects (ANYATTN_HAS_KV_INDICES), in the form that kernels read.
#pragma once
#include "anyattn.h"

namespace anyattn {

// Returns the bytes of the sorted lists, or 0 for a call without lists.
int64_t key_lists_bytes(const anyattn_call &call);

// Writes the sorted lists into `memory`, and `*sorted` as the call with these lists for kv_indices. Each list is a count
// and the selected key slots that are visible to the query, in ascending order, each once.
// Returns false if the caller's parallel_for did not run every task.
bool sort_key_lists(const anyattn_call &call, int32_t threads, void *memory, anyattn_call *sorted);

// Query row i of sequence b.
struct QueryRow {
    int64_t b, i;
};

// Rows that are allocated to sequences: their number, and the row with an index.
int64_t query_rows_of(const anyattn_call &call);
QueryRow query_row(const anyattn_call &call, int64_t index);

}  // namespace anyattn
