#include "append.h"

#include "half.h"
#include "tasks.h"

namespace anyattn {
namespace {

struct Float64 {
    using Value = double;
    using Storage = double;
    static Value load(Storage x) { return x; }
    static Storage store(Value x) { return x; }
};
struct Float32 {
    using Value = float;
    using Storage = float;
    static Value load(Storage x) { return x; }
    static Storage store(Value x) { return x; }
};
struct Float16 {
    using Value = float;
    using Storage = uint16_t;
    static Value load(Storage x) { return float_from_float16(x); }
    static Storage store(Value x) { return float16_from_float(x); }
};
struct BFloat16 {
    using Value = float;
    using Storage = uint16_t;
    static Value load(Storage x) { return float_from_bfloat16(x); }
    static Storage store(Value x) { return bfloat16_from_float(x); }
};

// cos and sin have the dtype of the rows or float32.
template <class T>
typename T::Value angle(const anyattn_array &table, int64_t position, int64_t index, bool own_dtype) {
    const char *row = element(table, position, 0, 0);
    if (own_dtype) return T::load(reinterpret_cast<const typename T::Storage *>(row)[index]);
    return reinterpret_cast<const float *>(row)[index];
}

// One head of one row, rotated at `position`; `from` and `to` may be the same memory.
template <class T>
void rotate(const anyattn_call &call, int32_t dtype, const char *from, char *to, int64_t position) {
    const auto *in = reinterpret_cast<const typename T::Storage *>(from);
    auto *out = reinterpret_cast<typename T::Storage *>(to);
    const int64_t half = call.rotary_dim / 2;
    const bool interleaved = call.flags & ANYATTN_ROTARY_INTERLEAVED;
    const bool own_cos = call.rotary_cos.dtype == dtype, own_sin = call.rotary_sin.dtype == dtype;
    for (int64_t d = 0; d < half; ++d) {
        const int64_t first = interleaved ? 2 * d : d, second = interleaved ? 2 * d + 1 : d + half;
        const auto x = T::load(in[first]), y = T::load(in[second]);
        const auto cos = angle<T>(call.rotary_cos, position, d, own_cos);
        const auto sin = angle<T>(call.rotary_sin, position, d, own_sin);
        out[first] = T::store(x * cos - y * sin);
        out[second] = T::store(x * sin + y * cos);
    }
    const size_t rest = static_cast<size_t>(call.head_dim - call.rotary_dim) * sizeof(typename T::Storage);
    std::memmove(out + call.rotary_dim, in + call.rotary_dim, rest);
}

using Rotate = void (*)(const anyattn_call &, int32_t, const char *, char *, int64_t);

Rotate rotation(int32_t dtype) {
    switch (dtype) {
        case ANYATTN_FLOAT64:
            return rotate<Float64>;
        case ANYATTN_FLOAT16:
            return rotate<Float16>;
        case ANYATTN_BFLOAT16:
            return rotate<BFloat16>;
        default:
            return rotate<Float32>;
    }
}

// Row t of new_k and new_v of sequence b. Where cache_batch_idx or block_table names a slot twice, one of them stays.
void append_row(const anyattn_call &call, Rotate rotate_row, int64_t b, int64_t t) {
    const int64_t slot = call.cache_seqlens[b] + t;
    int64_t entry = sequence(call, b).batch_k, row = slot;
    if (call.block_table) {
        entry = call.block_table[b * call.max_pages + slot / call.page_size];
        row = slot % call.page_size;
    } else if (call.cu_seqlens_k) {
        entry = 0;
        row += call.cu_seqlens_k[b];
    }
    const size_t bytes_v = static_cast<size_t>(call.head_dim_v * dtype_bytes(call.v.dtype));
    for (int64_t h = 0; h < call.nheads_kv; ++h) {
        rotate_row(call, call.k.dtype, element(call.new_k, b, t, h), element(call.k, entry, row, h), slot);
        std::memmove(element(call.v, entry, row, h), element(call.new_v, b, t, h), bytes_v);
    }
}

bool append_new(const anyattn_call &call, int32_t threads) {
    const Rotate rotate_row = rotation(call.k.dtype);
    const int64_t chunks = blocks_of(call.seqlen_new);
    return run_tasks(call, threads, call.batch * chunks, [&](int64_t task, int32_t) {
        const int64_t b = task / chunks, begin = task % chunks * kBlockQ;
        for (int64_t t = begin; t < min64(begin + kBlockQ, call.seqlen_new); ++t) append_row(call, rotate_row, b, t);
    });
}

bool rotate_q(const anyattn_call &call, int32_t threads) {
    if (!call.q.data) return true;
    const Rotate rotate_row = rotation(call.q.dtype);
    const bool moves = call.flags & (ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT);
    const int64_t chunks = blocks_of(call.seqlen_q);
    return run_tasks(call, threads, call.batch * chunks, [&](int64_t task, int32_t) {
        const Sequence s = sequence(call, task / chunks);
        const int64_t begin = task % chunks * kBlockQ, entry = call.cu_seqlens_q ? 0 : s.index;
        for (int64_t i = begin; i < min64(begin + kBlockQ, s.n_q); ++i) {
            const int64_t position = call.cache_seqlens[s.index] + (moves ? i : 0);
            for (int64_t h = 0; h < call.nheads; ++h) {
                rotate_row(call, call.q.dtype, element(call.q, entry, s.row_q + i, h),
                           element(call.out, entry, s.row_q + i, h), position);
            }
        }
    });
}

}  // namespace

bool run_append(const anyattn_call &call, int32_t threads) {
    return append_new(call, threads) && rotate_q(call, threads);
}

}  // namespace anyattn
