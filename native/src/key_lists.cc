#include "key_lists.h"

#include <algorithm>

#include "tasks.h"

namespace anyattn {
namespace {

// Rows that one task sorts.
constexpr int64_t kTaskRows = 16;

// Number of distinct lists per query: one per KV head, or one for all heads.
int64_t heads_of_lists(const anyattn_call &call) { return call.kv_indices.stride[1] ? call.nheads_kv : 1; }

int64_t allocated_rows(const anyattn_call &call) {
    return call.cu_seqlens_q ? call.total_q : call.batch * call.seqlen_q;
}

void sort_list(const anyattn_call &call, const Sequence &s, const int32_t *list, int64_t i, int32_t *sorted) {
    const int64_t begin = key_begin(call, s, i), end = key_end(call, s, i);
    const auto visible = [&](int32_t slot) { return slot >= begin && slot < end; };
    int32_t *first = sorted + 1, *last = std::copy_if(list, list + call.num_indices, first, visible);
    if (!std::is_sorted(first, last)) std::sort(first, last);
    sorted[0] = static_cast<int32_t>(std::unique(first, last) - first);
}

}  // namespace

int64_t query_rows_of(const anyattn_call &call) {
    return call.cu_seqlens_q ? call.cu_seqlens_q[call.batch] - call.cu_seqlens_q[0] : call.batch * call.seqlen_q;
}

QueryRow query_row(const anyattn_call &call, int64_t index) {
    if (!call.cu_seqlens_q) return {index / call.seqlen_q, index % call.seqlen_q};
    const int32_t *starts = call.cu_seqlens_q;
    const int64_t row = starts[0] + index;
    const int64_t b = std::upper_bound(starts, starts + call.batch + 1, row) - starts - 1;
    return {b, row - starts[b]};
}

int64_t key_lists_bytes(const anyattn_call &call) {
    if (!has_key_lists(call)) return 0;
    const int64_t entries = heads_of_lists(call) * allocated_rows(call) * (call.num_indices + 1);
    return (entries * static_cast<int64_t>(sizeof(int32_t)) + 63) / 64 * 64;
}

bool sort_key_lists(const anyattn_call &call, int32_t threads, void *memory, anyattn_call *sorted) {
    *sorted = call;
    const int64_t heads = heads_of_lists(call), rows = query_rows_of(call), size = call.num_indices + 1;
    const int64_t of_head = size * (call.cu_seqlens_q ? call.total_q : call.seqlen_q);
    sorted->kv_indices = {memory, {heads * of_head, heads == 1 ? 0 : of_head, size, 1}, ANYATTN_INT32, 0};
    return run_tasks(call, threads, heads * ((rows + kTaskRows - 1) / kTaskRows), [&](int64_t task, int32_t) {
        const int64_t h = task % heads, first = task / heads * kTaskRows;
        for (int64_t index = first; index < min64(first + kTaskRows, rows); ++index) {
            const QueryRow row = query_row(call, index);
            const Sequence s = sequence(call, row.b);
            if (row.i >= s.n_q) continue;
            sort_list(call, s, key_list(call, s, h, row.i), row.i, key_list(*sorted, s, h, row.i));
        }
    });
}

}  // namespace anyattn
