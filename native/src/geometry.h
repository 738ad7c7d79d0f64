// Location of each sequence in the arrays of a call, and the visible keys of each row. The namespace is anonymous because
// host code and every instruction set compile this file separately.
#pragma once
#include "anyattn.h"
#include "kernels.h"

namespace {

// One sequence: rows and keys in use, first key slot in use, and position of row 0.
struct Sequence {
    int64_t n_q, n_k, leftpad, offset;
    int64_t row_q, row_k;  // first row inside packed arrays
    int64_t batch_k;  // batch entry of dense k and v
    int64_t index;
};

inline Sequence sequence(const anyattn_call &call, int64_t b) {
    Sequence s{};
    s.index = b;
    s.batch_k = call.cache_batch_idx ? call.cache_batch_idx[b] : b;
    s.n_q = call.seqlen_q;
    s.n_k = call.seqlen_k;
    if (call.cu_seqlens_q) {
        s.row_q = call.cu_seqlens_q[b];
        s.n_q = call.cu_seqlens_q[b + 1] - s.row_q;
    }
    if (call.cu_seqlens_k) {
        s.row_k = call.cu_seqlens_k[b];
        s.n_k = call.cu_seqlens_k[b + 1] - s.row_k;
    }
    if (call.seqused_q) s.n_q = call.seqused_q[b];
    if (call.seqused_k) s.n_k = call.seqused_k[b];
    if (call.leftpad_k) s.leftpad = call.leftpad_k[b];
    if (call.offset) {
        s.offset = call.offset[b];
    } else if (!(call.flags & ANYATTN_TOP_LEFT)) {
        s.offset = s.n_k - s.leftpad - s.n_q;
    }
    return s;
}

// Returns the list of key slots of row i for KV head h, in a call with ANYATTN_HAS_KV_INDICES.
inline int32_t *key_list(const anyattn_call &call, const Sequence &s, int64_t h_kv, int64_t i) {
    const int64_t *stride = call.kv_indices.stride;
    const int64_t entry = call.cu_seqlens_q ? 0 : s.index * stride[0];
    return static_cast<int32_t *>(call.kv_indices.data) + entry + h_kv * stride[1] + (s.row_q + i) * stride[2];
}

inline bool has_key_lists(const anyattn_call &call) { return call.flags & ANYATTN_HAS_KV_INDICES; }

// Returns true once the caller has ended the call. Remaining work may then be skipped, because results are not used.
inline bool stopped(const anyattn_call &call) { return call.poll && call.poll(call.poll_user); }

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0)); }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Returns the most visible keys of any row, as an estimate of work.
inline int64_t most_keys(const anyattn_call &call) {
    return has_key_lists(call) ? min64(call.seqlen_k, call.num_indices) : call.seqlen_k;
}

// Returns the first visible key of row i.
inline int64_t key_begin(const anyattn_call &call, const Sequence &s, int64_t i) {
    const int64_t p = i + s.offset;
    int64_t c = 0;
    if (call.flags & ANYATTN_HAS_LEFT) c = max64(c, p - call.left);
    if (call.chunk > 0) c = max64(c, call.chunk * floor_div(p, call.chunk));
    return s.leftpad + c;
}

// Returns one past the last visible key of row i, which is <= key_begin if no key is visible.
inline int64_t key_end(const anyattn_call &call, const Sequence &s, int64_t i) {
    const int64_t p = i + s.offset;
    int64_t end = s.n_k;
    if (call.flags & ANYATTN_HAS_RIGHT) end = min64(end, s.leftpad + p + call.right + 1);
    if (call.chunk > 0) end = min64(end, s.leftpad + call.chunk * (floor_div(p, call.chunk) + 1));
    return end;
}

// Rows [index * kBlockQ, ...) of head h.
inline anyattn::QueryBlock query_block(const Sequence &s, int64_t h, int64_t index) {
    const int64_t i0 = index * anyattn::kBlockQ;
    return {s.index, h, 1, i0, min64(anyattn::kBlockQ, s.n_q - i0)};
}

}  // namespace
