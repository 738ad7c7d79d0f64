#include <algorithm>
#include <vector>

#include "check.h"
#include "geometry.h"

namespace anyattn {
namespace {

int32_t out_of_range(const anyattn_call &call, const char *name, int64_t index, int64_t value, int64_t low,
                     int64_t high) {
    return refuse(call, ANYATTN_OUT_OF_RANGE, "%s[%lld] is %lld; accepted: %lld to %lld", name, (long long)index,
                  (long long)value, (long long)low, (long long)high);
}

// Checks that starts of packed sequences never decrease and end inside the array, and that no sequence exceeds its limit.
int32_t check_cu_seqlens(const anyattn_call &call, const char *name, const int32_t *cu, int64_t total, int64_t seqlen) {
    if (!cu) return ANYATTN_SUCCESS;
    if (cu[0] < 0 || cu[0] > total) return out_of_range(call, name, 0, cu[0], 0, total);
    for (int64_t b = 0; b < call.batch; ++b) {
        const int64_t high = min64(total, cu[b] + seqlen);
        if (cu[b + 1] < cu[b] || cu[b + 1] > high) return out_of_range(call, name, b + 1, cu[b + 1], cu[b], high);
    }
    return ANYATTN_SUCCESS;
}

// Checks a table with one entry per sequence, from 0 to the capacity of the sequence.
int32_t check_seqused(const anyattn_call &call, const char *name, const int32_t *used, const int32_t *cu,
                      int64_t seqlen) {
    for (int64_t b = 0; used && b < call.batch; ++b) {
        const int64_t high = cu ? cu[b + 1] - cu[b] : seqlen;
        if (used[b] < 0 || used[b] > high) return out_of_range(call, name, b, used[b], 0, high);
    }
    return ANYATTN_SUCCESS;
}

int32_t check_leftpad(const anyattn_call &call) {
    for (int64_t b = 0; call.leftpad_k && b < call.batch; ++b) {
        const int64_t high = sequence(call, b).n_k;
        if (call.leftpad_k[b] < 0 || call.leftpad_k[b] > high) {
            return out_of_range(call, "leftpad_k", b, call.leftpad_k[b], 0, high);
        }
    }
    return ANYATTN_SUCCESS;
}

int32_t check_cache_batch_idx(const anyattn_call &call, int32_t pass) {
    const int32_t *idx = call.cache_batch_idx;
    if (!idx) return ANYATTN_SUCCESS;
    for (int64_t b = 0; b < call.batch; ++b) {
        if (idx[b] < 0 || idx[b] >= call.batch_k) {
            return out_of_range(call, "cache_batch_idx", b, idx[b], 0, call.batch_k - 1);
        }
    }
    if (!has_gradients(pass)) return ANYATTN_SUCCESS;
    std::vector<int32_t> sorted(idx, idx + call.batch);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice == sorted.end()) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_UNSUPPORTED,
                  "backward needs distinct entries in cache_batch_idx, and %d is there twice", *twice);
}

// Checks the entries of block_table for slots [begin, end) of sequence b. Other entries may have any value.
int32_t check_pages(const anyattn_call &call, int64_t b, int64_t begin, int64_t end) {
    if (begin >= end) return ANYATTN_SUCCESS;
    for (int64_t page = begin / call.page_size; page <= (end - 1) / call.page_size; ++page) {
        const int64_t index = b * call.max_pages + page;
        if (call.block_table[index] < 0 || call.block_table[index] >= call.num_pages) {
            return out_of_range(call, "block_table", index, call.block_table[index], 0, call.num_pages - 1);
        }
    }
    return ANYATTN_SUCCESS;
}

// Checks the lists of the rows in use. Lists of other rows may have any values.
int32_t check_kv_indices(const anyattn_call &call) {
    if (call.num_indices == 0) return ANYATTN_SUCCESS;
    const int64_t heads = call.kv_indices.stride[1] ? call.nheads_kv : 1;
    for (int64_t b = 0; b < call.batch; ++b) {
        const Sequence s = sequence(call, b);
        const int64_t slots = call.cu_seqlens_k ? call.cu_seqlens_k[b + 1] - call.cu_seqlens_k[b] : call.seqlen_k;
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t i = 0; i < s.n_q; ++i) {
                const int32_t *list = key_list(call, s, h, i);
                int64_t bad = 0;
                while (bad < call.num_indices && list[bad] >= -1 && list[bad] < slots) ++bad;
                if (bad == call.num_indices) continue;
                return refuse(
                    call, ANYATTN_OUT_OF_RANGE,
                    "kv_indices of sequence %lld, KV head %lld, query %lld, entry %lld is %d; accepted: -1 to %lld",
                    (long long)b, (long long)h, (long long)i, (long long)bad, list[bad], (long long)slots - 1);
            }
        }
    }
    return ANYATTN_SUCCESS;
}

// Checks the slots that append writes, and the last position that it rotates to.
int32_t check_cache_seqlens(const anyattn_call &call) {
    const bool q_moves = call.flags & (ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT);
    const int32_t *lengths = call.cache_seqlens;
    if (call.batch > 0 && !lengths) return refuse(call, ANYATTN_NULL_POINTER, "cache_seqlens is null; append needs it");
    for (int64_t b = 0; b < call.batch; ++b) {
        const int64_t slots = call.cu_seqlens_k ? call.cu_seqlens_k[b + 1] - call.cu_seqlens_k[b] : call.seqlen_k;
        if (lengths[b] < 0) return out_of_range(call, "cache_seqlens", b, lengths[b], 0, slots);
        if (call.seqlen_new > 0 && lengths[b] > slots - call.seqlen_new) {
            return refuse(call, ANYATTN_OUT_OF_RANGE,
                          "cache_seqlens[%lld] is %d; with %lld new rows it is more than the %lld slots", (long long)b,
                          lengths[b], (long long)call.seqlen_new, (long long)slots);
        }
        const int64_t rows_q = call.q.data ? sequence(call, b).n_q : 0;
        const int64_t rows = max64(call.seqlen_new, q_moves ? rows_q : min64(rows_q, 1));
        if (call.rotary_dim > 0 && rows > 0 && lengths[b] + rows > call.rotary_positions) {
            return refuse(call, ANYATTN_OUT_OF_RANGE,
                          "cache_seqlens[%lld] is %d; with %lld rows it is more than the %lld rotary_positions",
                          (long long)b, lengths[b], (long long)rows, (long long)call.rotary_positions);
        }
        if (call.block_table) {
            if (const int32_t status = check_pages(call, b, lengths[b], lengths[b] + call.seqlen_new)) return status;
        }
    }
    return ANYATTN_SUCCESS;
}

}  // namespace

int32_t check_tables(const anyattn_call &call, int32_t pass) {
    int32_t status;
    if ((status = check_cu_seqlens(call, "cu_seqlens_q", call.cu_seqlens_q, call.total_q, call.seqlen_q)) ||
        (status = check_cu_seqlens(call, "cu_seqlens_k", call.cu_seqlens_k, call.total_k, call.seqlen_k)) ||
        (status = check_seqused(call, "seqused_q", call.seqused_q, call.cu_seqlens_q, call.seqlen_q)) ||
        (status = check_seqused(call, "seqused_k", call.seqused_k, call.cu_seqlens_k, call.seqlen_k)) ||
        (status = check_cache_batch_idx(call, pass)) || (status = check_leftpad(call))) {
        return status;
    }
    if (pass == ANYATTN_APPEND) return check_cache_seqlens(call);
    for (int64_t b = 0; call.block_table && b < call.batch; ++b) {
        if ((status = check_pages(call, b, 0, sequence(call, b).n_k))) return status;
    }
    return has_key_lists(call) ? check_kv_indices(call) : ANYATTN_SUCCESS;
}

}  // namespace anyattn
