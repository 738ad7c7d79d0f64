// The table of kernels of one instruction set, which picks the products for the dtypes of a call.
#pragma once
#include <type_traits>

#include "dbias.inl.h"
#include "few.inl.h"
#include "forward.inl.h"
#include "second.inl.h"
#include "tangent.inl.h"
#include ANYATTN_PRODUCTS  // the products header of this instruction set, see targets.def

namespace anyattn {
namespace {

// Whether another row of targets.def, the base, computes the calls for which this row has no products of its own.
constexpr bool kHasBase = ANYATTN_HAS_BASE;

// Whether this instruction set computes a dtype. If it has a base, the base computes those dtypes that have no products of
// their own here.
template <int32_t dtype>
constexpr bool is_own = !kHasBase || !is_plain<typename Products<dtype>::M>;

// The dtype whose products compute a pass. A float32 dout keeps its precision: the backward pass then multiplies float32
// numbers. With ANYATTN_FAST, the products of float16 numbers, which have fewer parts, multiply float32 numbers.
int32_t product_dtype(const anyattn_call &call, int32_t pass) {
    const int32_t dtype = call.q.dtype;
    if (dtype == ANYATTN_FLOAT64) return dtype;
    const bool wide_dout = pass == ANYATTN_BACKWARD && call.dout.dtype == ANYATTN_FLOAT32;
    const bool is_float32 = dtype == ANYATTN_FLOAT32 || wide_dout || is_quantised(call);
    if (!is_float32) return dtype;
    return call.flags & ANYATTN_FAST ? ANYATTN_FLOAT16 : ANYATTN_FLOAT32;
}

// Calls body(M()) with the products M of a dtype that is_own.
template <class Body>
auto with_products(int32_t dtype, const Body &body) {
    if constexpr (is_own<ANYATTN_FLOAT64>) {
        if (dtype == ANYATTN_FLOAT64) return body(Products<ANYATTN_FLOAT64>::M());
    }
    if constexpr (is_own<ANYATTN_FLOAT16>) {
        if (dtype == ANYATTN_FLOAT16) return body(Products<ANYATTN_FLOAT16>::M());
    }
    if constexpr (is_own<ANYATTN_FLOAT32>) {
        if (dtype == ANYATTN_FLOAT32) return body(Products<ANYATTN_FLOAT32>::M());
    }
    return body(Products<ANYATTN_BFLOAT16>::M());
}

// Whether this instruction set multiplies bfloat16 queries by quantised keys. Otherwise float32 products do.
constexpr bool kHasByteProducts = !std::is_void<ByteProducts<ANYATTN_BFLOAT16>::M>::value;

bool multiplies_bytes(const anyattn_call &call, int32_t pass) {
    return is_quantised(call) && call.q.dtype == ANYATTN_BFLOAT16 && pass == ANYATTN_FORWARD;
}

// Calls body(M()) with the products M of this pass.
template <class Body>
auto with_mma(const anyattn_call &call, int32_t pass, const Body &body) {
    if constexpr (kHasByteProducts) {
        if (multiplies_bytes(call, pass)) return body(ByteProducts<ANYATTN_BFLOAT16>::M());
    }
    return with_products(product_dtype(call, pass), body);
}

bool is_tangent(int32_t pass) { return pass == ANYATTN_TANGENT || pass == ANYATTN_FORWARD_TANGENT; }

// Whether the kernels of the tangent pass can use the products M: they store weights in place of scores.
template <class M>
constexpr bool has_tangents = M::weights_in_scores;

bool computes_dtype(int32_t dtype) {
    switch (dtype) {
        case ANYATTN_FLOAT64:
            return is_own<ANYATTN_FLOAT64>;
        case ANYATTN_FLOAT32:
            return is_own<ANYATTN_FLOAT32>;
        case ANYATTN_FLOAT16:
            return is_own<ANYATTN_FLOAT16>;
        default:
            return is_own<ANYATTN_BFLOAT16>;
    }
}

// Whether this table computes a pass of a call. Otherwise the base does.
bool computes(const anyattn_call &call, int32_t pass) {
    if (!kHasBase || (kHasByteProducts && multiplies_bytes(call, pass))) return true;
    const int32_t dtype = product_dtype(call, pass);
    if (is_quantised(call) || pass == ANYATTN_SECOND || !computes_dtype(dtype)) return false;
    return !is_tangent(pass) || with_products(dtype, [](auto m) { return has_tangents<decltype(m)>; });
}

double peak(int32_t dtype, int64_t n, volatile double *sink) {
    return with_products(dtype, [&](auto m) { return decltype(m)::peak(n, sink); });
}

int64_t lanes_of(const anyattn_call &call) { return call.q.dtype == ANYATTN_FLOAT64 ? lanes<double> : lanes<float>; }

int64_t scratch(const anyattn_call &call, int32_t pass) {
    return with_mma(call, pass, [&](auto m) {
        using M = decltype(m);
        Arena arena{nullptr, 0};
        if (pass == ANYATTN_FORWARD) {
            Arena few{nullptr, 0};
            using F = typename M::Few;
            ForwardScratch<M>(call, most_blocks<M>(call), arena);
            ForwardScratch<F>(call, most_groups<F>(call), few);
            return max64(arena.used, few.used);
        }
        if constexpr (has_tangents<M>) {
            if (is_tangent(pass)) {
                TangentScratch<M>(call, pass == ANYATTN_FORWARD_TANGENT, kTangentBlocks, arena);
                return arena.used;
            }
        }
        Arena dbias{nullptr, 0};
        if constexpr (!kHasBase) {
            if (pass == ANYATTN_SECOND) {
                SecondScratch<M>(call, arena);
                if (call.dbias.data) SecondDbias<M>(call, dbias);
                return max64(arena.used, dbias.used);
            }
        }
        BackwardScratch<M>(call, backward_blocks_at_once<M>(call), arena);
        if (call.dbias.data) DbiasScratch<M>(call, dbias);
        return max64(arena.used, dbias.used);
    });
}

int64_t partial_stride(const anyattn_call &call, int64_t dim) { return round_up(dim, lanes_of(call)); }

bool partial_in_place(const anyattn_call &call) {
    const int32_t dtype = call.q.dtype == ANYATTN_FLOAT64 ? ANYATTN_FLOAT64 : ANYATTN_FLOAT32;
    const int64_t width = lanes_of(call);
    // Rows that are a power of two apart share few cache sets, so that a dense copy is faster.
    const auto crowded = [&](const anyattn_array &array, int64_t dim) {
        return array.stride[1] != dim && array.stride[1] * dtype_size(dtype) % 1024 == 0;
    };
    if (crowded(call.dk, call.head_dim) || crowded(call.dv, call.head_dim_v)) return false;
    return call.dk.dtype == dtype && call.dv.dtype == dtype && call.head_dim % width == 0 &&
           call.head_dim_v % width == 0 && !(call.flags & ANYATTN_ACCUMULATE);
}

// body(M()) for the M that computes the forward pass of a block of so many rows.
template <class Body>
auto with_rows(const anyattn_call &call, int64_t rows, const Body &body) {
    return with_mma(call, ANYATTN_FORWARD, [&](auto m) {
        using M = decltype(m);
        const bool few = sizeof(typename M::C) == 4 || !is_quantised(call);
        return few && rows <= kFewRows<typename M::C> ? body(typename M::Few()) : body(m);
    });
}

void forward(const anyattn_call &call, const BlockSet &set, int64_t begin, int64_t end, void *partial, void *memory) {
    // The last rows of a long sequence use the same products as its other rows, in any task.
    const bool is_long = !has_key_lists(call) && sequence(call, set.first.b).n_q > kBlockQ;
    with_rows(call, is_long ? kBlockQ : set.first.heads * set.first.rows, [&](auto m) {
        using M = decltype(m);
        [[maybe_unused]] const typename M::Task task;
        forward_blocks<M>(call, set, begin, end, partial, memory);
    });
}

int64_t blocks_at_once(const anyattn_call &call, int64_t rows) {
    return with_rows(call, rows, [&](auto m) {
        using M = decltype(m);
        return min64(M::most_blocks, most_blocks<M>(call));
    });
}

int64_t groups_at_once(const anyattn_call &call, int64_t rows) {
    return with_rows(call, rows, [&](auto m) { return most_groups<decltype(m)>(call); });
}

// body(C()) for the compute type of a call.
template <class Body>
auto with_compute(const anyattn_call &call, const Body &body) {
    return call.q.dtype == ANYATTN_FLOAT64 ? body(double()) : body(float());
}

void merge(const anyattn_call &call, const QueryBlock &rows, void *into, const void *from) {
    with_mma(call, ANYATTN_FORWARD, [&](auto m) { merge_partial<decltype(m)>(call, rows, into, from); });
}

void finish(const anyattn_call &call, const QueryBlock &rows, const void *partial) {
    with_mma(call, ANYATTN_FORWARD, [&](auto m) { finish_partial<decltype(m)>(call, rows, partial); });
}

int64_t partial_row_bytes(const anyattn_call &call) {
    return with_compute(call, [&](auto c) { return ForwardPartial<decltype(c)>::row_size(call) * (int64_t)sizeof(c); });
}

void backward(const anyattn_call &call, int32_t pass, const BackwardPart &part, const Partial &partial,
              double *sink_partial, void *statistics, void *memory) {
    with_mma(call, pass, [&](auto m) {
        using M = decltype(m);
        if constexpr (!kHasBase) {
            if (pass == ANYATTN_SECOND) {
                return second_group<M>(call, part, partial, sink_partial, statistics, memory);
            }
        }
        [[maybe_unused]] const typename M::Task task;
        backward_group<M>(call, part, partial, sink_partial, statistics, memory);
    });
}

void reduce(const anyattn_call &call, int64_t b, int64_t h_kv, int64_t row0, int64_t row1, const Partial *partials,
            int64_t splits) {
    with_mma(call, ANYATTN_BACKWARD,
             [&](auto m) { reduce_group<typename decltype(m)::C>(call, b, h_kv, row0, row1, partials, splits); });
}

void dbias(const anyattn_call &call, int32_t pass, int64_t bias_b, int64_t bias_h, int64_t block_q, int64_t block_k,
           void *statistics, void *memory) {
    with_mma(call, pass, [&](auto m) {
        using M = decltype(m);
        if constexpr (!kHasBase) {
            if (pass == ANYATTN_SECOND) {
                return dbias_tile<M, SecondDbias<M>>(call, bias_b, bias_h, block_q, block_k, statistics, memory);
            }
        }
        [[maybe_unused]] const typename M::Task task;
        dbias_tile<M, DbiasScratch<M>>(call, bias_b, bias_h, block_q, block_k, statistics, memory);
    });
}

int64_t tile_keys(const anyattn_call &call, int32_t pass) {
    return with_mma(call, pass, [](auto m) { return int64_t(decltype(m)::score_keys); });
}

int64_t statistics_bytes(const anyattn_call &call) {
    return with_compute(call, [&](auto c) { return (int64_t)sizeof(StoredRow<decltype(c)>); });
}

void tangent(const anyattn_call &call, bool online, const BlockSet &set, void *memory) {
    with_mma(call, ANYATTN_TANGENT, [&](auto m) {
        using M = decltype(m);
        if constexpr (has_tangents<M>) {
            online ? tangent_blocks<M, true>(call, set, memory) : tangent_blocks<M, false>(call, set, memory);
        }
    });
}

constexpr Kernels table(const char *name, const Kernels *base) {
    return {name,     base,           computes,       scratch,   partial_stride,   partial_in_place,
            forward,  blocks_at_once, groups_at_once, merge,     finish,           partial_row_bytes,
            backward, reduce,         dbias,          tile_keys, statistics_bytes, tangent,
            peak};
}

}  // namespace
}  // namespace anyattn
