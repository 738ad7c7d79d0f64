// Gradients: P again from the saved lse, five matrix products per tile, no atomics.
// Dao, "FlashAttention-2" (2023), algorithm 2; queries outside, keys inside.
#pragma once
#include "statistics.inl.h"

namespace anyattn {
namespace {

// S and T hold the products of a panel and n keys; P (with dropout) and dS times scale go where Out keeps them.
// Works on pairs of keys and of vectors.
template <class Out>
ANYATTN_NOINLINE void gradient_pass(typename Out::C *S, typename Out::C *T, int64_t n, int vectors,
                                    typename Out::C factor, typename Out::C scale, typename Out::C *steep,
                                    typename Out::C *keep, const RowStatistics<typename Out::C> &rows, int64_t row,
                                    const typename Out::Gradients &gradients) {
    using C = typename Out::C;
    using V = typename Out::V;
    constexpr int width = lanes<C>, stride = panel<C>;
    for (int c = 0; n % 2 && c < vectors; ++c) {
        const int64_t at = n * stride + c * width;
        store(S + at, splat(-infinity(C())));
        store(T + at, V{});
        if (steep) store(steep + at, V{});
        if (keep) store(keep + at, V{});
    }
    for (int c = 0; c < vectors; c += 2) {
        V base[2], rest[2], middle[2];
        for (int x = 0; x < 2; ++x) {
            base[x] = load<V>(rows.base + row + (c + x) * width);
            rest[x] = load<V>(rows.rest + row + (c + x) * width);
            middle[x] = load<V>(rows.delta + row + (c + x) * width);
        }
        for (int64_t j = 0; j < n; j += 2) {
            V p[2][2], ds[2][2];
            ANYATTN_UNROLL
            for (int r = 0; r < 2; ++r) {
                ANYATTN_UNROLL
                for (int x = 0; x < 2; ++x) {
                    const int64_t at = (j + r) * stride + (c + x) * width;
                    p[r][x] = exp2((load<V>(S + at) - base[x]) * splat(factor) - rest[x]);
                    const V kept = keep ? load<V>(keep + at) : splat(C(1));
                    ds[r][x] = p[r][x] * (load<V>(T + at) * kept - middle[x]) * splat(scale);
                    if (steep) ds[r][x] *= load<V>(steep + at);
                    p[r][x] *= kept;
                }
            }
            Out::store_gradients(gradients, j, c, p, ds);
        }
    }
}

// Keys [first, first + n) of a tile.
struct Range {
    int64_t first, n;
};

// P and dS (times scale) of panel p and keys [j0, j1), stored by Out; the rest of the tile is zero. With `capped`, dS is
// the gradient before the softcap. Returns the keys that the panel may see.
template <class M, class Out>
Range fill_gradients(const ScoreBlock<typename M::C> &block, const TileScratch<M> &w, const typename M::Keys &keys,
                     const typename M::Keys &values, int p, int64_t j0, int64_t j1, typename M::C scale, bool capped,
                     const typename Out::Gradients &gradients, TileAhead &ahead) {
    using C = typename M::C;
    using V = typename M::V;
    const anyattn_call &call = block.call;
    const int64_t first = block.panel_begin(p, j0), keys_in_sight = max64(0, block.panel_end(p, j1) - first);
    const MaskUse use = mask_use(block, p, first, keys_in_sight);
    const int64_t n = use == kSeesNone ? 0 : keys_in_sight;
    const Range range{n > 0 ? first - j0 : 0, n};
    Out::clear(gradients, 0, range.first);
    Out::clear(gradients, range.first + round_up(n, 2), j1 - j0);
    if (n == 0) return range;
    C *S = w.S + p * w.tile + range.first * panel<C>, *T = w.T + p * w.tile + range.first * panel<C>;
    C *steep = capped ? w.steep : nullptr;
    V top[kPanelVectors] = {};
    const int rows = block.panel_rows(p);
    TileAhead none{};
    M::scores(values, range.first, n, call.head_dim_v, w.dout + p * w.dout_size, rows, T, top, none);
    M::scores(keys, range.first, n, call.head_dim, w.q + p * w.q_size, rows, S, top, ahead);
    score_tile(block, p, first, n, use, w.added, steep, S, top);
    if (w.keep) keep_tile(w.keep, block, p, first, n);
    gradient_pass<Out>(S, T, n, block.panel_vectors(p), block.units.factor, scale, steep, w.keep,
                       RowStatistics<C>(w.rows), p * panel<C>, Out::from(gradients, range.first));
    return range;
}

template <class M>
struct BackwardScratch {
    using C = typename M::C;
    TileScratch<M> tiles;
    int64_t dq_size;  // of one panel
    C *dq;
    char *gradients, *q_rows, *dout_rows;
    Partial tile{};  // dk and dv of a tile of selected keys, before they are added to rows anywhere

    BackwardScratch(const anyattn_call &call, Arena &arena) : tiles(call, arena) {
        dq_size = round_up(call.head_dim, lanes<C>) * panel<C>;
        dq = arena.take<C>(dq_size * (kBlockQ / panel<C>));
        gradients = arena.take<char>(M::gradients_size());
        q_rows = arena.take<char>(M::row_buffer(call.head_dim));
        dout_rows = arena.take<char>(M::row_buffer(call.head_dim_v));
        if (!has_key_lists(call)) return;
        tile.dk_stride = round_up(call.head_dim, lanes<C>);
        tile.dv_stride = round_up(call.head_dim_v, lanes<C>);
        tile.dk = arena.take<C>(kKeys * tile.dk_stride);
        tile.dv = arena.take<C>(kKeys * tile.dv_stride);
    }
};

// Where a tile of keys adds its gradients: rows of the partial, or for selected keys a tile of zeros.
template <class M>
Partial sums_of_tile(const ScoreBlock<typename M::C> &block, const BackwardScratch<M> &w, const Partial &partial,
                     int64_t j0, int64_t n) {
    using C = typename M::C;
    if (!block.slots) {
        return {static_cast<C *>(partial.dk) + j0 * partial.dk_stride,
                static_cast<C *>(partial.dv) + j0 * partial.dv_stride, partial.dk_stride, partial.dv_stride};
    }
    __builtin_memset(w.tile.dk, 0, sizeof(C) * (size_t)(n * w.tile.dk_stride));
    __builtin_memset(w.tile.dv, 0, sizeof(C) * (size_t)(n * w.tile.dv_stride));
    return w.tile;
}

// Adds the gradients of n selected keys to the rows of their slots.
template <class C>
ANYATTN_NOINLINE void add_to_slots(void *to, int64_t to_stride, const void *tile, int64_t stride, const int32_t *slots,
                                   int64_t n) {
    using V = typename Lanes<C>::V;
    for (int64_t j = 0; j < n; ++j) {
        C *row = static_cast<C *>(to) + slots[j] * to_stride;
        const C *added = static_cast<const C *>(tile) + j * stride;
        for (int64_t d = 0; d < stride; d += lanes<C>) store(row + d, load<V>(row + d) + load<V>(added + d));
    }
}

// Adds the parts of dsink of a block's heads, `step` apart.
template <class C>
void add_sink_gradients(const ScoreBlock<C> &block, const RowStatistics<C> &rows, double *sums, int64_t step) {
    for (int i = 0; i < block.rows; ++i) {
        sums[(block.head(i) - block.h) * step] -= double(rows.sink[i]) * double(rows.delta[i]);
    }
}

// Keys of a block that one call of backward_block visits. `sums` is where dq is kept between the visits.
struct Visit {
    int64_t begin, end;
    bool first, last;
    void *sums;
};

// Block `at` of a part. Keys before the first of the block count as visited by the part that has the first keys.
template <class C>
Visit visit_of(const ScoreBlock<C> &block, const BackwardPart &part, int64_t at) {
    const int64_t size = kBlockQ * round_up(block.call.head_dim, lanes<C>);
    return {max64(block.begin, part.key_begin), min64(block.end, part.key_end), part.key_begin <= block.begin,
            block.end <= part.key_end, part.dq ? static_cast<C *>(part.dq) + at * size : nullptr};
}

template <class M>
void backward_block(const ScoreBlock<typename M::C> &block, const BackwardScratch<M> &w, const Partial &partial,
                    double *sink_sums, int64_t sink_step, void *statistics, const Visit &visit) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    const TileScratch<M> &tiles = w.tiles;
    const RowStatistics<C> rows(tiles.rows);
    pack_rows(block, tiles);
    fill_statistics(block, tiles);
    if (statistics && visit.first) store_statistics(block, rows, statistics);
    if (sink_sums && visit.first) add_sink_gradients(block, rows, sink_sums, sink_step);
    const RowTable dq = block.table(call.dq);
    const auto q_rows = M::load_rows(block.strided(call.q), block.rows, call.head_dim, w.q_rows);
    const auto dout_rows = M::load_rows(block.strided(call.dout), block.rows, call.head_dim_v, w.dout_rows);
    const KeyRows k = block.keys(call.k), v = block.keys(call.v);
    const size_t dq_bytes = (size_t)(block.panels * w.dq_size * (int64_t)sizeof(C));
    if (visit.first) {
        __builtin_memset(w.dq, 0, dq_bytes);
    } else {
        __builtin_memcpy(w.dq, visit.sums, dq_bytes);
    }
    const auto gradients = M::gradients(tiles.S, tiles.T, w.gradients);
    for (int64_t j0 = visit.begin; j0 < visit.end && !stopped(call); j0 += kKeys) {
        const int64_t j1 = min64(j0 + kKeys, visit.end), n = j1 - j0;
        const auto keys = M::load_keys(k, j0, n, call.head_dim, kSumDim | kSumKeys, tiles.k);
        const auto values = M::load_keys(v, j0, n, call.head_dim_v, kSumDim, tiles.v);
        TileAhead next = next_tile(call, &k, &v, 1, j1, min64(j1 + kKeys, visit.end));
        for (int p = 0; p < block.panels; ++p) {
            const auto part = M::panel_of(gradients, p);
            const Range r =
                fill_gradients<M, M>(block, tiles, keys, values, p, j0, j1, C(call.scale), true, part, next);
            M::accumulate_dq(part, keys, r.first, r.n, call.head_dim, block.panel_rows(p), w.dq + p * w.dq_size);
        }
        const Partial to = sums_of_tile(block, w, partial, j0, n);
        M::accumulate_dv(gradients, n, dout_rows, block.rows, call.head_dim_v, static_cast<C *>(to.dv), to.dv_stride);
        M::accumulate_dk(gradients, n, q_rows, block.rows, call.head_dim, static_cast<C *>(to.dk), to.dk_stride);
        if (!block.slots) continue;
        add_to_slots<C>(partial.dk, partial.dk_stride, to.dk, to.dk_stride, block.slots + j0, n);
        add_to_slots<C>(partial.dv, partial.dv_stride, to.dv, to.dv_stride, block.slots + j0, n);
    }
    if (!visit.last) {
        __builtin_memcpy(visit.sums, w.dq, dq_bytes);
        return;
    }
    for (int p = 0; p < block.panels; ++p) {
        unpack_panel(dq.row + p * panel<C>, dq.dtype, w.dq + p * w.dq_size, block.panel_rows(p), call.head_dim,
                     (const C *)nullptr, call.flags & ANYATTN_ACCUMULATE);
    }
}

// The rows of a block of queries, one query and the heads that share its keys at a time.
template <class M>
void backward_rows(const anyattn_call &call, const Sequence &s, int64_t h_kv, int64_t block, const Partial &partial,
                   double *sink_sums, void *statistics, const BackwardScratch<M> &w) {
    const int64_t group = call.nheads / call.nheads_kv, blocks = (s.n_q + kBlockQ - 1) / kBlockQ;
    for (int64_t i = block * kBlockQ; i < min64((block + 1) * kBlockQ, s.n_q); ++i) {
        for (int64_t first = 0; first < group; first += kBlockQ) {
            const QueryBlock row{s.index, h_kv * group + first, min64(kBlockQ, group - first), i, 1};
            const ScoreBlock<typename M::C> score(call, row, M::score_factor(call.scale));
            backward_block<M>(score, w, partial, sink_sums ? sink_sums + first * blocks + block : nullptr, blocks,
                              statistics, {score.begin, score.end, true, true, nullptr});
        }
    }
}

template <class M>
void backward_group(const anyattn_call &call, const BackwardPart &part, const Partial &partial, double *sink_sums,
                    void *statistics, void *memory) {
    const Sequence s = sequence(call, part.b);
    const int64_t group = call.nheads / call.nheads_kv, blocks = (s.n_q + kBlockQ - 1) / kBlockQ;
    Arena arena{static_cast<char *>(memory), 0};
    const BackwardScratch<M> w(call, arena);
    for (int64_t at = part.first; at < part.end && !stopped(call); at += part.step) {
        if (has_key_lists(call)) {
            backward_rows<M>(call, s, part.h_kv, at, partial, sink_sums, statistics, w);
            continue;
        }
        const ScoreBlock<typename M::C> block(call, query_block(s, part.h_kv * group + at / blocks, at % blocks),
                                              M::score_factor(call.scale));
        const Visit visit = visit_of(block, part, at);
        if (!visit.first && block.end <= part.key_begin) continue;
        backward_block<M>(block, w, partial, sink_sums ? sink_sums + at : nullptr, blocks, statistics, visit);
    }
}

// Rows [row0, row1) of dk or dv: the partials of all splits, in order.
template <class C>
void reduce_rows(const KeyRows &target, bool add, int64_t row0, int64_t row1, int64_t dim, const Partial *partials,
                 int64_t splits, void *Partial::*data, int64_t Partial::*stride) {
    using V = typename Lanes<C>::V;
    const int32_t dtype = target.rows.dtype;
    for (int64_t j = row0; j < row1; ++j) {
        for (int64_t d = 0; d < dim; d += lanes<C>) {
            char *to = target.rows.at(j, d);
            V sum{};
            for (int64_t x = 0; x < splits; ++x) {
                sum += load<V>(static_cast<const C *>(partials[x].*data) + j * partials[x].*stride + d);
            }
            if (add) sum += load_part<C>(to, dtype, dim - d);
            store_part(to, dtype, sum, dim - d);
        }
    }
}

template <class C>
void reduce_group(const anyattn_call &call, int64_t b, int64_t h_kv, int64_t row0, int64_t row1,
                  const Partial *partials, int64_t splits) {
    const Sequence s = sequence(call, b);
    const bool add = call.flags & ANYATTN_ACCUMULATE;
    const KeyRows dk = key_rows(call.dk, call, s, h_kv), dv = key_rows(call.dv, call, s, h_kv);
    reduce_rows<C>(dk, add, row0, row1, call.head_dim, partials, splits, &Partial::dk, &Partial::dk_stride);
    reduce_rows<C>(dv, add, row0, row1, call.head_dim_v, partials, splits, &Partial::dv, &Partial::dv_stride);
}

}  // namespace
}  // namespace anyattn
