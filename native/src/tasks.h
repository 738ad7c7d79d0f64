// Numbered tasks over rows, and arrays as bytes that the scheduler may clear.
#pragma once
#include <cstring>

#include "check.h"
#include "geometry.h"
#include "kernels.h"
#include "threads.h"

namespace anyattn {

// Calls body(task, worker) for every task, until the caller ends the call. Returns false as parallel_for does.
template <class Body>
bool run_tasks(const anyattn_call &call, int32_t threads, int64_t tasks, const Body &body) {
    struct Context {
        const anyattn_call &call;
        const Body &body;
    };
    const auto call_body = [](void *pointer, int64_t task, int32_t worker) {
        const Context &context = *static_cast<const Context *>(pointer);
        if (!stopped(context.call)) context.body(task, worker);
    };
    Context context{call, body};
    return parallel_for(call, tasks, threads, call_body, &context);
}

constexpr int64_t blocks_of(int64_t rows) { return (rows + kBlockQ - 1) / kBlockQ; }

// Blocks of kBlockQ allocated rows of all sequences. No block contains rows of two sequences. Block numbers need no
// table: if packed sequence b starts r rows after the first sequence, its first block is r / kBlockQ + b. Some numbers
// then stand for no rows.
struct AllocatedRows {
    const int32_t *cu;
    int64_t batch, seqlen, total;

    int64_t first_block(int64_t b) const { return cu ? (cu[b] - cu[0]) / kBlockQ + b : b * blocks_of(seqlen); }
    int64_t blocks() const { return first_block(batch); }
    // An upper bound of blocks() from sizes alone.
    int64_t most_blocks() const { return cu ? total / kBlockQ + batch : blocks(); }
    int64_t allocated(int64_t b) const { return cu ? cu[b + 1] - cu[b] : seqlen; }

    int64_t sequence_of(int64_t block) const {
        if (!cu) return block / blocks_of(seqlen);
        int64_t low = 0, high = batch;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first_block(middle) <= block ? low : high) = middle;
        }
        return low;
    }

    // Returns the number of packed rows before the first and after the last sequence.
    int64_t outside() const { return cu ? cu[0] + total - cu[batch] : 0; }
    int64_t outside_row(int64_t index) const { return index < cu[0] ? index : cu[batch] + index - cu[0]; }
};

inline AllocatedRows rows_q(const anyattn_call &call) {
    return {call.cu_seqlens_q, call.batch, call.seqlen_q, call.total_q};
}

inline AllocatedRows rows_k(const anyattn_call &call) {
    return {call.cu_seqlens_k, call.batch, call.seqlen_k, call.total_k};
}

inline char *element(const anyattn_array &array, int64_t i, int64_t j, int64_t k) {
    const int64_t offset = i * array.stride[0] + j * array.stride[1] + k * array.stride[2];
    return static_cast<char *>(array.data) + offset * dtype_bytes(array.dtype);
}

// Sets `dim` values of each of `heads` heads of one row to 0. Packed arrays have only entry 0.
inline void clear_row(const anyattn_array &array, int64_t entry, int64_t row, int64_t head0, int64_t heads,
                      int64_t dim) {
    if (!array.data) return;
    const size_t bytes = static_cast<size_t>(dim * dtype_bytes(array.dtype));
    for (int64_t h = head0; h < head0 + heads; ++h) std::memset(element(array, entry, row, h), 0, bytes);
}

// Returns the number of allocated rows of q that no sequence uses.
inline int64_t unused_rows(const anyattn_call &call) {
    if (!call.seqused_q && !call.cu_seqlens_q) return 0;
    const AllocatedRows rows = rows_q(call);
    int64_t unused = rows.outside();
    for (int64_t b = 0; b < call.batch; ++b) unused += rows.allocated(b) - sequence(call, b).n_q;
    return unused;
}

// Calls body(entry, row, h) for every head of each unused row.
template <class Body>
bool for_unused_rows(const anyattn_call &call, int32_t threads, const Body &body) {
    constexpr int64_t few = 1 << 16;  // values that one thread clears faster than it wakes another
    const int64_t unused = unused_rows(call);
    if (unused == 0) return true;
    if (unused * call.nheads * max64(call.head_dim, call.head_dim_v) < few) threads = 1;
    const AllocatedRows rows = rows_q(call);
    const int64_t inside = rows.blocks() * call.nheads;
    return run_tasks(call, threads, inside + blocks_of(rows.outside()), [&](int64_t task, int32_t) {
        if (task < inside) {
            const int64_t block = task / call.nheads;
            const Sequence s = sequence(call, rows.sequence_of(block));
            const int64_t begin = (block - rows.first_block(s.index)) * kBlockQ;
            const int64_t end = min64(begin + kBlockQ, rows.allocated(s.index));
            for (int64_t i = max64(begin, s.n_q); i < end; ++i) {
                body(call.cu_seqlens_q ? 0 : s.index, s.row_q + i, task % call.nheads);
            }
            return;
        }
        const int64_t index = (task - inside) * kBlockQ;
        for (int64_t i = index; i < min64(index + kBlockQ, rows.outside()); ++i) {
            for (int64_t h = 0; h < call.nheads; ++h) body(0, rows.outside_row(i), h);
        }
    });
}

}  // namespace anyattn
