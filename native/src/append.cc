#include "append.h"

#include <vector>

#include "half.h"
#include "quantise.h"
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

// Rotates one head of one row at `position`; `from` and `to` may be the same memory.
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

// Rotates one head of one row at `position`. The rotation is computed in float64, which rounds the same way on every
// processor, and the result is float32.
template <class T>
void rotate_wide(const anyattn_call &call, int32_t dtype, const char *from, int64_t dim, int64_t rotary_dim,
                 int64_t position, float *to) {
    const auto *in = reinterpret_cast<const typename T::Storage *>(from);
    const int64_t half = rotary_dim / 2;
    const bool interleaved = call.flags & ANYATTN_ROTARY_INTERLEAVED;
    const bool own_cos = call.rotary_cos.dtype == dtype, own_sin = call.rotary_sin.dtype == dtype;
    for (int64_t d = 0; d < half; ++d) {
        const int64_t first = interleaved ? 2 * d : d, second = interleaved ? 2 * d + 1 : d + half;
        const double x = T::load(in[first]), y = T::load(in[second]);
        const double cos = angle<T>(call.rotary_cos, position, d, own_cos);
        const double sin = angle<T>(call.rotary_sin, position, d, own_sin);
        // volatile, because a fused multiply-add would round differently.
        const volatile double x_cos = x * cos, y_sin = y * sin, x_sin = x * sin, y_cos = y * cos;
        to[first] = static_cast<float>(x_cos - y_sin);
        to[second] = static_cast<float>(x_sin + y_cos);
    }
    for (int64_t d = rotary_dim; d < dim; ++d) to[d] = static_cast<float>(T::load(in[d]));
}

using RotateWide = void (*)(const anyattn_call &, int32_t, const char *, int64_t, int64_t, int64_t, float *);

RotateWide wide_rotation(int32_t dtype) {
    switch (dtype) {
        case ANYATTN_FLOAT64:
            return rotate_wide<Float64>;
        case ANYATTN_FLOAT16:
            return rotate_wide<Float16>;
        case ANYATTN_BFLOAT16:
            return rotate_wide<BFloat16>;
        default:
            return rotate_wide<Float32>;
    }
}

// Quantises one row of new_k and new_v into k and v, with one scale per head. values: memory for one head.
void quantise_row(const anyattn_call &call, int64_t b, int64_t t, int64_t entry, int64_t row, int64_t slot,
                  float *values) {
    const int32_t dtype = call.new_k.dtype;
    const RotateWide rotate_row = wide_rotation(dtype);
    const auto scale = [&](const anyattn_array &array, int64_t h) {
        return reinterpret_cast<float *>(element(array, entry, row, h));
    };
    for (int64_t h = 0; h < call.nheads_kv; ++h) {
        rotate_row(call, dtype, element(call.new_k, b, t, h), call.head_dim, call.rotary_dim, slot, values);
        quantise(values, call.head_dim, call.k.dtype, element(call.k, entry, row, h), scale(call.k_scale, h));
        rotate_row(call, dtype, element(call.new_v, b, t, h), call.head_dim_v, 0, slot, values);
        quantise(values, call.head_dim_v, call.v.dtype, element(call.v, entry, row, h), scale(call.v_scale, h));
    }
}

// Appends row t of new_k and new_v of sequence b. If cache_batch_idx or block_table names a slot twice, one of the rows
// remains.
void append_row(const anyattn_call &call, Rotate rotate_row, int64_t b, int64_t t, float *values) {
    const int64_t slot = call.cache_seqlens[b] + t;
    int64_t entry = sequence(call, b).batch_k, row = slot;
    if (call.block_table) {
        entry = call.block_table[b * call.max_pages + slot / call.page_size];
        row = slot % call.page_size;
    } else if (call.cu_seqlens_k) {
        entry = 0;
        row += call.cu_seqlens_k[b];
    }
    if (is_quantised(call.k.dtype)) return quantise_row(call, b, t, entry, row, slot, values);
    const size_t bytes_v = static_cast<size_t>(call.head_dim_v * dtype_bytes(call.v.dtype));
    for (int64_t h = 0; h < call.nheads_kv; ++h) {
        rotate_row(call, call.k.dtype, element(call.new_k, b, t, h), element(call.k, entry, row, h), slot);
        std::memmove(element(call.v, entry, row, h), element(call.new_v, b, t, h), bytes_v);
    }
}

bool append_new(const anyattn_call &call, int32_t threads) {
    const Rotate rotate_row = rotation(call.k.dtype);
    const int64_t chunks = blocks_of(call.seqlen_new);
    const int64_t room = is_quantised(call.k.dtype) ? max64(call.head_dim, call.head_dim_v) : 0;  // of each worker
    std::vector<float> values(static_cast<size_t>(room * threads));
    return run_tasks(call, threads, call.batch * chunks, [&](int64_t task, int32_t worker) {
        const int64_t b = task / chunks, begin = task % chunks * kBlockQ;
        for (int64_t t = begin; t < min64(begin + kBlockQ, call.seqlen_new); ++t) {
            append_row(call, rotate_row, b, t, values.data() + worker * room);
        }
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
