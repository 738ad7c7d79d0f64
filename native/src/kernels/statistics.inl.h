// Row statistics that the backward pass computes before it visits keys: the terms that turn scores into P, and delta.
#pragma once
#include "few.inl.h"
#include "softmax.inl.h"

namespace anyattn {
namespace {

// Returns the largest |lse| from which P = exp(s - lse) is exact enough. The rounding of lse, half a unit in its last
// place, becomes a relative error of P. Rows with a larger |lse| are summed again, so that their P adds up to 1. 16-bit
// calls tolerate a larger error, because they round P itself.
inline double largest_trusted_lse(const anyattn_call &call) { return dtype_size(call.q.dtype) == 2 ? 1024 : 128; }

// For each row of a block: P_ij = 2^(factor (S_ij - base_i) - rest_i) and dS_ij = P_ij (dP_ij - delta_i). base is close
// to the largest S_ij, so that their difference is exact. It is inf if the row has no visible key.
template <class C>
struct RowStatistics {
    static constexpr int64_t size = 4 * kBlockQ;
    C *base, *rest, *delta;
    C *sink;  // the sink's probability

    explicit RowStatistics(C *data)
        : base(data), rest(data + kBlockQ), delta(data + 2 * kBlockQ), sink(data + 3 * kBlockQ) {}
};

// Packed q of a block, and the statistics of its rows (RowStatistics).
template <class M>
struct QueryRows {
    using C = typename M::C;
    int64_t q_size;  // of one panel
    typename M::Packed *q;
    C *rows;

    QueryRows(const anyattn_call &call, Arena &arena) {
        q_size = M::packed_size(call.head_dim);
        q = arena.take<typename M::Packed>(q_size * (kBlockQ / M::panel));
        rows = arena.take<C>(RowStatistics<C>::size);
    }
};

// Packed q and dout of a block.
template <class M>
struct BackwardRows : QueryRows<M> {
    int64_t dout_size;  // of one panel
    typename M::Packed *dout;

    BackwardRows(const anyattn_call &call, Arena &arena) : QueryRows<M>(call, arena) {
        dout_size = M::packed_size(call.head_dim_v);
        dout = arena.take<typename M::Packed>(dout_size * (kBlockQ / M::panel));
    }
};

// Tiles of P and dS, and scratch memory to compute them, for any block.
template <class M>
struct TileScratch {
    using C = typename M::C;
    static constexpr int64_t tile = kTileKeys * M::panel;
    C *S, *T, *P, *added, *tanhs, *keep;  // of one panel; tanhs: see score_tile
    C *registers, *t, *ds;  // of a score program; t and ds: scores and dS for the gradients of captured arrays
    double *captured = nullptr;  // sums of the gradients of captured arrays
    C *m, *l, *alpha;  // per row, see SoftmaxRows
    char *k, *v;

    TileScratch(const anyattn_call &call, Arena &arena) {
        S = arena.take<C>(tile);
        T = arena.take<C>(tile);
        P = M::weights_in_scores ? S : arena.take<C>(tile);
        added = has_added(call) ? arena.take<C>(tile) : nullptr;
        tanhs = call.softcap > 0 || has_score_function(call) ? arena.take<C>(tile) : nullptr;
        keep = call.dropout_threshold ? arena.take<C>(tile) : nullptr;
        m = arena.take<C>(kBlockQ);
        l = arena.take<C>(kBlockQ);
        alpha = arena.take<C>(kBlockQ);
        registers = take_registers<C>(call, arena);
        t = has_captured_gradients(call) ? arena.take<C>(tile) : nullptr;
        ds = has_captured_gradients(call) ? arena.take<C>(tile) : nullptr;
        k = arena.take<char>(M::key_buffer(call.head_dim, kSumDim | kSumKeys, M::score_keys));
        v = arena.take<char>(M::key_buffer(call.head_dim_v, kSumDim, M::score_keys));
    }
};

// Computes products_i = <a_i, b_i> for the rows of a block, where a and b have the shape of out; 0 after the last row.
template <class C, int P>
ANYATTN_NOINLINE void fill_products(const ScoreBlock<C, P> &block, const anyattn_array &first,
                                    const anyattn_array &second, C *products) {
    using V = typename Lanes<C>::V;
    const StridedRows a = block.strided(first), b = block.strided(second);
    const int64_t dim = block.call.head_dim_v;
    const auto fill = [&](auto dtype_a, auto dtype_b) {
        for (int i = 0; i < kBlockQ; i += lanes<C>) {
            V sums[lanes<C>] = {};
            for (int x = 0; x < min64(lanes<C>, block.rows - i); ++x) {
                for (int64_t d = 0; d < dim; d += lanes<C>) {
                    sums[x] +=
                        load_part<C>(a.at(i + x, d), dtype_a, dim - d) * load_part<C>(b.at(i + x, d), dtype_b, dim - d);
                }
            }
            store(products + i, sum_each<C>(sums));
        }
    };
    if (a.dtype != b.dtype) return fill(a.dtype, b.dtype);
    with_dtype<C>(a.dtype, [&](auto dtype) { fill(dtype, dtype); });
}

// Computes delta_i = <dout_i, out_i> - dlse_i for the rows of a block.
template <class C, int P>
void fill_delta(const ScoreBlock<C, P> &block, C *delta) {
    const StridedRows dlse = block.strided_values(block.call.dlse);
    fill_products(block, block.call.out, block.call.dout, delta);
    for (int i = 0; dlse.data && i < block.rows; ++i) delta[i] -= load<C>(dlse.row(i));
}

// Computes the row statistics from the saved lse. Returns the largest |lse|.
template <class C, int P>
ANYATTN_NOINLINE double read_lse(const ScoreBlock<C, P> &block, const RowStatistics<C> &rows) {
    const StridedRows lse = block.strided_values(block.call.lse);
    const double unit = block.units.unit, limit = sizeof(C) == 4 ? double(__FLT_MAX__) : __DBL_MAX__;
    double largest = 0;
    for (int i = 0; i < kBlockQ; ++i) {
        rows.base[i] = infinity(C());
        rows.rest[i] = rows.sink[i] = 0;
        const double value = i < block.rows ? double(load<C>(lse.row(i))) : -infinity(0.0);
        if (value == -infinity(0.0)) continue;
        const double base = value / unit, sink = double(block.sink(i));
        rows.base[i] = C(base < -limit ? -limit : base > limit ? limit : base);
        rows.rest[i] = C((value - double(rows.base[i]) * unit) * kLog2e);
        if (sink > -infinity(0.0)) rows.sink[i] = C(__builtin_exp(sink < value ? sink - value : 0.0));
        const double size = value < 0 ? -value : value;
        if (size > largest) largest = size;
    }
    return largest;
}

// Computes the maximum and the sum of weights of every row of a block, as in the forward pass.
template <class M>
ANYATTN_NOINLINE void sum_rows(const Block<M> &block, const QueryRows<M> &of_block, const TileScratch<M> &w) {
    const anyattn_call &call = block.call;
    const KeyRows k = block.keys(call.k);
    const SoftmaxRows<M> softmax{w.S, w.P, w.added, nullptr, w.registers, w.m, w.l, w.alpha};
    TileAhead none{};
    clear_sums(w.m, w.l);
    for (int64_t j0 = block.begin; j0 < block.end && !stopped(call); j0 += M::score_keys) {
        const int64_t j1 = min64(j0 + M::score_keys, block.end);
        const auto keys = M::load_keys(k, j0, j1 - j0, call.head_dim, kSumDim, w.k);
        for (int p = 0; p < block.panels; ++p) {
            const auto [first, n, use] = visible_keys(block, p, j0, j1, M::key_step);
            if (n == 0) continue;
            softmax.add_keys(block, p, keys, j0, first, n, use, of_block.q + p * of_block.q_size, none);
        }
    }
}

// Replaces the statistics of rows with a large lse by those of their maximum and sum. If the saved lse exceeds the new
// one by more than rounding, it includes other keys, as in ring attention. Then the saved lse is used, and P adds up to
// less than 1.
template <class M>
ANYATTN_NOINLINE void refine_statistics(const Block<M> &block, const QueryRows<M> &of_block, const TileScratch<M> &w) {
    using C = typename M::C;
    const RowStatistics<C> rows(of_block.rows);
    const StridedRows saved = block.strided_values(block.call.lse);
    const double eps = sizeof(C) == 4 ? double(__FLT_EPSILON__) : __DBL_EPSILON__;
    // The forward pass sums the products of few rows in another order, see few.inl.h.
    const bool few = (block.slots ? block.rows : block.s.n_q) <= kFewRows<C>;
    const double rounding = few ? 32 * eps : 2 * eps;
    sum_rows(block, of_block, w);
    for (int i = 0; i < block.rows; ++i) {
        const double lse = double(load<C>(saved.row(i))), size = lse < 0 ? -lse : lse;
        const double m = double(w.m[i]) * block.units.unit, sink = double(block.sink(i)), top = sink > m ? sink : m;
        if (!(size > largest_trusted_lse(block.call)) || !(w.l[i] > 0)) continue;
        const double sum = double(w.l[i]) * __builtin_exp(m - top) + __builtin_exp(sink - top);
        if (!(top + __builtin_log(sum) >= lse - rounding * size)) continue;
        rows.base[i] = w.m[i];
        rows.rest[i] = C((top - m + __builtin_log(sum)) * kLog2e);
        rows.sink[i] = C(__builtin_exp(sink - top) / sum);
    }
}

template <class M>
void pack_queries(const Block<M> &block, const anyattn_array &array, typename M::Packed *to, int64_t size) {
    const anyattn_call &call = block.call;
    const RowTable q = block.table(array);
    for (int p = 0; p < block.panels; ++p) {
        M::pack(to + p * size, q.row + p * M::panel, q.dtype, block.panel_rows(p), call.head_dim,
                M::query_factor(call.scale));
    }
}

template <class M>
void pack_rows(const Block<M> &block, const BackwardRows<M> &w) {
    const anyattn_call &call = block.call;
    const RowTable dout = block.table(call.dout);
    pack_queries<M>(block, call.q, w.q, w.q_size);
    for (int p = 0; p < block.panels; ++p) {
        M::pack(w.dout + p * w.dout_size, dout.row + p * M::panel, dout.dtype, block.panel_rows(p), call.head_dim_v, 1);
    }
}

template <class M>
void fill_statistics(const Block<M> &block, const BackwardRows<M> &of_block, const TileScratch<M> &w) {
    using C = typename M::C;
    const RowStatistics<C> rows(of_block.rows);
    fill_delta(block, rows.delta);
    if (read_lse(block, rows) > largest_trusted_lse(block.call)) refine_statistics(block, of_block, w);
}

// Row statistics that dbias reads. The backward pass stores them in the workspace for every row of every head, because
// a task of dbias visits rows of many blocks and would have to compute them again.
template <class C>
struct StoredRow {
    C base, rest, delta;
};

// Returns the index of row r of a block. Each head has seqlen_q rows.
template <class C, int P>
int64_t stored_index(const ScoreBlock<C, P> &block, int r) {
    return (block.s.index * block.call.nheads + block.head(r)) * block.call.seqlen_q + block.row(r);
}

template <class C, int P>
void store_statistics(const ScoreBlock<C, P> &block, const RowStatistics<C> &rows, void *stored) {
    for (int r = 0; r < block.rows; ++r) {
        static_cast<StoredRow<C> *>(stored)[stored_index(block, r)] = {rows.base[r], rows.rest[r], rows.delta[r]};
    }
}

template <class C, int P>
void load_statistics(const ScoreBlock<C, P> &block, const void *stored, const RowStatistics<C> &rows) {
    for (int r = 0; r < kBlockQ; ++r) {
        StoredRow<C> row{infinity(C()), 0, 0};
        if (r < block.rows) row = static_cast<const StoredRow<C> *>(stored)[stored_index(block, r)];
        rows.base[r] = row.base;
        rows.rest[r] = row.rest;
        rows.delta[r] = row.delta;
    }
}

}  // namespace
}  // namespace anyattn
