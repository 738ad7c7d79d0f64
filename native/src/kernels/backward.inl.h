// Gradients. P is computed again from the saved lse. A tile takes five matrix products, and nothing is atomic.
// Dao, "FlashAttention-2" (2023), algorithm 2, with queries in the outer loop and keys in the inner loop.
#pragma once
#include <new>

#include "score_gradients.inl.h"
#include "statistics.inl.h"

namespace anyattn {
namespace {

// Most bytes of state of the blocks whose gradients a task sums together. The state should fit in L2.
constexpr int64_t kBackwardBytes = 1024 * 1024;

// Arrays of a tile for the gradient of score_mod. slopes: its derivative, or null. ds: receives dS, or null.
template <class C>
struct FunctionGradients {
    const C *slopes;
    C *ds;
};

// Computes P (with dropout) and dS times scale of a panel and n keys, and stores both through Out. S holds the scores,
// T the products of dout and values. The loop takes keys in pairs, and vectors in pairs if a panel has more than one.
template <class M, class Out>
ANYATTN_NOINLINE void gradient_pass(typename M::C *S, typename M::C *T, int64_t n, int vectors, typename M::C factor,
                                    typename M::C scale, typename M::C *tanhs,
                                    const FunctionGradients<typename M::C> &functions, typename M::C *keep,
                                    const RowStatistics<typename M::C> &rows, int64_t row,
                                    const typename Out::Gradients &gradients) {
    using C = typename M::C;
    using V = typename M::V;
    constexpr int width = lanes<C>, stride = M::panel, X = stride > width ? 2 : 1;
    for (int c = 0; n % 2 && c < vectors; ++c) {
        const int64_t at = n * stride + c * width;
        store(S + at, splat(-infinity(C())));
        store(T + at, V{});
        if (tanhs) store(tanhs + at, V{});
        if (keep) store(keep + at, V{});
    }
    for (int c = 0; c < vectors; c += X) {
        V base[X], rest[X], middle[X];
        for (int x = 0; x < X; ++x) {
            base[x] = load<V>(rows.base + row + (c + x) * width);
            rest[x] = load<V>(rows.rest + row + (c + x) * width);
            middle[x] = load<V>(rows.delta + row + (c + x) * width);
        }
        for (int64_t j = 0; j < n; j += 2) {
            V p[2][X], ds[2][X];
            ANYATTN_UNROLL
            for (int r = 0; r < 2; ++r) {
                ANYATTN_UNROLL
                for (int x = 0; x < X; ++x) {
                    const int64_t at = (j + r) * stride + (c + x) * width;
                    p[r][x] = M::weight((load<V>(S + at) - base[x]) * splat(factor) - rest[x], splat(C(1)));
                    const V kept = keep ? load<V>(keep + at) : splat(C(1));
                    const V score_ds = p[r][x] * (load<V>(T + at) * kept - middle[x]);
                    if (functions.ds) store(functions.ds + at, score_ds);
                    ds[r][x] = score_ds * splat(scale);
                    if (functions.slopes) {
                        ds[r][x] = term_of(ds[r][x], functions.slopes + at);
                    } else if (tanhs) {
                        ds[r][x] *= softcap_slope(tanhs + at);
                    }
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

// Computes P and dS (times scale) of panel p and keys [j0, j1), and stores both through Out. Entries of masked keys are
// set to 0. With `capped`, dS is the gradient of the scores before the softcap. Returns the keys that are visible to
// the panel.
template <class M, class Out>
Range fill_gradients(const Block<M> &block, const BackwardRows<M> &of_block, const TileScratch<M> &w,
                     const typename M::Keys &keys, const typename M::Keys &values, int p, int64_t j0, int64_t j1,
                     typename M::C scale, bool capped, const typename Out::Gradients &gradients, TileAhead &ahead) {
    using C = typename M::C;
    using V = typename M::V;
    const anyattn_call &call = block.call;
    const auto [first, n, use] = visible_keys(block, p, j0, j1, M::key_step);
    const Range range{first - j0, n};
    Out::clear(gradients, 0, range.first);
    Out::clear(gradients, range.first + round_up(n, 2), j1 - j0);
    if (n == 0) return range;
    C *S = w.S + range.first * M::panel, *T = w.T + range.first * M::panel;
    const bool scored = has_score_function(call), captures = capped && w.captured;
    C *tanhs = capped && (!scored || has_slopes(call)) ? w.tanhs : nullptr;
    const FunctionGradients<C> functions{scored ? tanhs : nullptr, captures ? w.ds : nullptr};
    C *t = captures && score_section(call, kScoreCapture).reads_score ? w.t : nullptr;
    V top[kPanelVectors] = {};
    const int rows = block.panel_rows(p);
    TileAhead none{};
    M::scores(values, range.first, n, call.head_dim_v, of_block.dout + p * of_block.dout_size, rows, T, top, none);
    const AddedAhead added_ahead(block, p, first, n, ahead);
    M::scores(keys, range.first, n, call.head_dim, of_block.q + p * of_block.q_size, rows, S, top, ahead);
    ahead.bias = ahead.mask = {};
    score_tile(block, p, first, n, use, w.added, tanhs, {w.registers, t}, S, (V *)nullptr);
    if (w.keep) keep_tile(w.keep, block, p, first, n);
    gradient_pass<M, Out>(S, T, n, block.panel_vectors(p), block.units.factor, scale, tanhs, functions, w.keep,
                          RowStatistics<C>(of_block.rows), p * M::panel, Out::from(gradients, range.first));
    if (captures) capture_pass(block, kScoreCapture, p, first, n, w.t, w.ds, w.registers, w.captured);
    return range;
}

// Keys of a block that one call of backward_blocks visits. `sums` holds dq between two visits.
struct Visit {
    int64_t begin, end;
    bool first, last;
    void *sums;
};

// Returns the visit of block `at` in a part. It is the first visit if the part's keys begin at or before the first
// visible key of the block.
template <class M>
Visit visit_of(const Block<M> &block, const BackwardPart &part, int64_t at) {
    using C = typename M::C;
    const int64_t size = kBlockQ * round_up(block.call.head_dim, lanes<C>);
    return {max64(block.begin, part.key_begin), min64(block.end, part.key_end), part.key_begin <= block.begin,
            block.end <= part.key_end, part.dq ? static_cast<C *>(part.dq) + at * size : nullptr};
}

// State of a block in addition to the tiles: its packed rows, its dQ, and its P and dS of one tile of keys.
template <class M>
struct BackwardState {
    using C = typename M::C;
    BackwardRows<M> packed;
    int64_t dq_size;  // of one panel
    C *dq;
    char *gradients, *q_rows, *dout_rows;

    BackwardState(const anyattn_call &call, Arena &arena) : packed(call, arena) {
        dq_size = round_up(call.head_dim, lanes<C>) * M::panel;
        dq = arena.take<C>(dq_size * (kBlockQ / M::panel));
        gradients = arena.take<char>(M::gradients_size());
        q_rows = arena.take<char>(M::row_buffer(call.head_dim));
        dout_rows = arena.take<char>(M::row_buffer(call.head_dim_v));
    }
};

// P and dS of a block for a tile of keys, and the rows of q and dout that they multiply in the sums dK and dV.
template <class M>
struct WeightedRows {
    typename M::Gradients gradients;
    typename M::Rows q, dout;
    int64_t rows;
    unsigned panels;  // bit p is set if panel p has weights other than 0
};

// Returns the number of blocks whose contributions to dK and dV are summed together, tile by tile.
template <class M>
int64_t backward_blocks_at_once(const anyattn_call &call) {
    if (has_key_lists(call)) return 1;
    Arena arena{nullptr, 0};
    BackwardState<M>(call, arena);
    const int64_t blocks = call.nheads / call.nheads_kv * ((call.seqlen_q + kBlockQ - 1) / kBlockQ);
    return max64(1, min64(blocks, min64(M::most_backward_blocks, kBackwardBytes / arena.used)));
}

template <class M>
struct BackwardScratch {
    using C = typename M::C;
    TileScratch<M> tiles;
    int64_t most;  // blocks
    Block<M> *blocks;
    Visit *visits;
    BackwardState<M> *states;
    WeightedRows<M> *weighted, *seen;  // weighted: of all blocks; seen: of blocks with a visible key in the tile
    Partial tile{};  // dk and dv of a tile of selected keys, before they are added to the rows of their slots

    BackwardScratch(const anyattn_call &call, int64_t blocks_at_once, Arena &arena)
        : tiles(call, arena), most(blocks_at_once) {
        blocks = arena.take<Block<M>>(most);
        visits = arena.take<Visit>(most);
        states = arena.take<BackwardState<M>>(most);
        weighted = arena.take<WeightedRows<M>>(most);
        seen = arena.take<WeightedRows<M>>(most);
        for (int64_t i = 0; i < most; ++i) {
            const BackwardState<M> state(call, arena);
            if (arena.base) new (states + i) BackwardState<M>(state);
        }
        if (!has_key_lists(call)) return;
        tile.dk_stride = round_up(call.head_dim, lanes<C>);
        tile.dv_stride = round_up(call.head_dim_v, lanes<C>);
        tile.dk = arena.take<C>(M::score_keys * tile.dk_stride);
        tile.dv = arena.take<C>(M::score_keys * tile.dv_stride);
    }
};

// Returns the sums that a tile of keys adds to: rows of the partial or, for selected keys, a tile that is set to 0.
template <class M>
Partial sums_of_tile(const Block<M> &block, const BackwardScratch<M> &w, const Partial &partial, int64_t j0,
                     int64_t n) {
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

// Adds the contributions of a block to dsink, one sum per head. The sums are `step` numbers apart.
template <class C, int P>
void add_sink_gradients(const ScoreBlock<C, P> &block, const RowStatistics<C> &rows, double *sums, int64_t step) {
    for (int i = 0; i < block.rows; ++i) {
        sums[(block.head(i) - block.h) * step] -= double(rows.sink[i]) * double(rows.delta[i]);
    }
}

// Outputs of a block's row statistics. sink_sums: sums for dsink, or null. statistics: receives the rows for dbias, or
// null.
struct RowOutputs {
    double *sink_sums;
    int64_t sink_step;
    void *statistics;
};

template <class M>
int64_t dq_bytes(const Block<M> &block, const BackwardState<M> &state) {
    return block.panels * state.dq_size * (int64_t)sizeof(typename M::C);
}

// Sets dQ of a block to the sums of its previous visit, or to 0 at its first visit.
template <class M>
void start_dq(const Block<M> &block, const BackwardState<M> &state, const Visit &visit) {
    if (visit.first) {
        __builtin_memset(state.dq, 0, (size_t)dq_bytes<M>(block, state));
    } else {
        __builtin_memcpy(state.dq, visit.sums, (size_t)dq_bytes<M>(block, state));
    }
}

// Prepares block `index` of w for a visit: packs its rows, computes their statistics and initialises its dQ.
template <class M>
void start_block(const BackwardScratch<M> &w, int64_t index, const Visit &visit, const RowOutputs &outputs) {
    const Block<M> &block = w.blocks[index];
    const BackwardState<M> &state = w.states[index];
    const anyattn_call &call = block.call;
    const RowStatistics<typename M::C> rows(state.packed.rows);
    pack_rows<M>(block, state.packed);
    fill_statistics<M>(block, state.packed, w.tiles);
    if (outputs.statistics && visit.first) store_statistics(block, rows, outputs.statistics);
    if (outputs.sink_sums && visit.first) add_sink_gradients(block, rows, outputs.sink_sums, outputs.sink_step);
    const auto q = M::load_rows(block.strided(call.q), block.rows, call.head_dim, state.q_rows);
    const auto dout = M::load_rows(block.strided(call.dout), block.rows, call.head_dim_v, state.dout_rows);
    const auto gradients = M::gradients(state.gradients);
    new (w.weighted + index) WeightedRows<M>{gradients, q, dout, block.rows, 0};
    w.visits[index] = visit;
    start_dq<M>(block, state, visit);
}

// Adds keys [j0, j1) to dQ of a block and stores their P and dS in `weighted`.
template <class M>
void attend_backward(const Block<M> &block, const BackwardState<M> &state, const TileScratch<M> &tiles,
                     const typename M::Keys &keys, const typename M::Keys &values, int64_t j0, int64_t j1,
                     WeightedRows<M> *weighted, TileAhead &next) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    weighted->panels = 0;
    for (int p = 0; p < block.panels; ++p) {
        const auto part = M::panel_of(weighted->gradients, p);
        const Range r =
            fill_gradients<M, M>(block, state.packed, tiles, keys, values, p, j0, j1, C(call.scale), true, part, next);
        if (r.n == 0) continue;
        weighted->panels |= 1u << p;
        M::accumulate_dq(part, keys, r.first, r.n, call.head_dim, block.panel_rows(p), state.dq + p * state.dq_size);
    }
}

// Writes dQ of a block after its last visit. After other visits, saves it for the next one.
template <class M>
void finish_block(const Block<M> &block, const BackwardState<M> &state, const Visit &visit) {
    const anyattn_call &call = block.call;
    if (!visit.last) {
        __builtin_memcpy(visit.sums, state.dq, (size_t)dq_bytes<M>(block, state));
        return;
    }
    const RowTable dq = block.table(call.dq);
    for (int p = 0; p < block.panels; ++p) {
        unpack_panel<typename M::C, M::panel>(dq.row + p * M::panel, dq.dtype, state.dq + p * state.dq_size,
                                              block.panel_rows(p), call.head_dim, nullptr,
                                              call.flags & ANYATTN_ACCUMULATE);
    }
}

// Computes the first `count` blocks of w, after start_block. They belong to one KV head.
template <class M>
void backward_blocks(const BackwardScratch<M> &w, int64_t count, const Partial &partial) {
    using C = typename M::C;
    const Block<M> &first = w.blocks[0];
    const anyattn_call &call = first.call;
    int64_t begin = w.visits[0].begin, end = w.visits[0].end;
    for (int64_t i = 1; i < count; ++i) {
        begin = min64(begin, w.visits[i].begin);
        end = max64(end, w.visits[i].end);
    }
    const KeyRows k = first.keys(call.k), v = first.keys(call.v);
    for (int64_t j0 = begin; j0 < end && !stopped(call); j0 += M::score_keys) {
        const int64_t j1 = min64(j0 + M::score_keys, end), n = j1 - j0;
        if (all_hidden<M>(w.blocks, count, j0, j1)) continue;
        const auto keys = M::load_keys(k, j0, n, call.head_dim, kSumDim | kSumKeys, w.tiles.k);
        const auto values = M::load_keys(v, j0, n, call.head_dim_v, kSumDim, w.tiles.v);
        TileAhead next = next_tile(call, &k, &v, 1, j1, min64(j1 + M::score_keys, end));
        int64_t seen = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (w.visits[i].begin >= j1 || w.visits[i].end <= j0) continue;
            if (hidden_by_function(w.blocks[i], j0, j1)) continue;
            attend_backward<M>(w.blocks[i], w.states[i], w.tiles, keys, values, j0, j1, w.weighted + i, next);
            if (w.weighted[i].panels) w.seen[seen++] = w.weighted[i];
        }
        if (seen == 0) continue;
        const Partial to = sums_of_tile<M>(first, w, partial, j0, n);
        M::accumulate_dv(w.seen, seen, n, call.head_dim_v, static_cast<C *>(to.dv), to.dv_stride);
        M::accumulate_dk(w.seen, seen, n, call.head_dim, static_cast<C *>(to.dk), to.dk_stride);
        if (!first.slots) continue;
        add_to_slots<C>(partial.dk, partial.dk_stride, to.dk, to.dk_stride, first.slots + j0, n);
        add_to_slots<C>(partial.dv, partial.dv_stride, to.dv, to.dv_stride, first.slots + j0, n);
    }
    for (int64_t i = 0; i < count; ++i) finish_block<M>(w.blocks[i], w.states[i], w.visits[i]);
}

template <class M>
const Block<M> &place_block(const anyattn_call &call, const QueryBlock &rows, const BackwardScratch<M> &w,
                            int64_t index) {
    return *new (w.blocks + index) Block<M>(call, rows, M::score_factor(call.scale));
}

// Computes a block of queries with key lists: one query and the heads that share its keys at a time.
template <class M>
void backward_rows(const anyattn_call &call, const Sequence &s, int64_t h_kv, int64_t block, const Partial &partial,
                   double *sink_sums, void *statistics, const BackwardScratch<M> &w) {
    const int64_t group = call.nheads / call.nheads_kv, blocks = (s.n_q + kBlockQ - 1) / kBlockQ;
    for (int64_t i = block * kBlockQ; i < min64((block + 1) * kBlockQ, s.n_q); ++i) {
        for (int64_t first = 0; first < group; first += kBlockQ) {
            const QueryBlock row{s.index, h_kv * group + first, min64(kBlockQ, group - first), i, 1};
            const Block<M> &placed = place_block<M>(call, row, w, 0);
            start_block<M>(w, 0, {placed.begin, placed.end, true, true, nullptr},
                           {sink_sums ? sink_sums + first * blocks + block : nullptr, blocks, statistics});
            backward_blocks<M>(w, 1, partial);
        }
    }
}

template <class M>
void backward_group(const anyattn_call &call, const BackwardPart &part, const Partial &partial, double *sink_sums,
                    void *statistics, void *memory) {
    const Sequence s = sequence(call, part.b);
    const int64_t group = call.nheads / call.nheads_kv, blocks = (s.n_q + kBlockQ - 1) / kBlockQ;
    Arena arena{static_cast<char *>(memory), 0};
    BackwardScratch<M> w(call, backward_blocks_at_once<M>(call), arena);
    w.tiles.captured = part.captured;
    for (int64_t at = part.first; at < part.end && !stopped(call);) {
        if (has_key_lists(call)) {
            backward_rows<M>(call, s, part.h_kv, at, partial, sink_sums, statistics, w);
            at += part.step;
            continue;
        }
        int64_t count = 0;
        for (; count < w.most && at < part.end; at += part.step) {
            const QueryBlock rows = query_block(s, part.h_kv * group + at / blocks, at % blocks);
            const Block<M> &block = place_block<M>(call, rows, w, count);
            const Visit visit = visit_of<M>(block, part, at);
            if (!visit.first && block.end <= part.key_begin) continue;
            start_block<M>(w, count++, visit, {sink_sums ? sink_sums + at : nullptr, blocks, statistics});
        }
        if (count > 0) backward_blocks<M>(w, count, partial);
    }
}

// Adds the partials of all splits, in order, and writes rows [row0, row1) of dk or dv.
template <class C>
void reduce_rows(const KeyRows &target, bool add, int64_t row0, int64_t row1, int64_t dim, const Partial *partials,
                 int64_t splits, void *Partial::*data, int64_t Partial::*stride) {
    using V = typename Lanes<C>::V;
    with_dtype<C>(target.rows.dtype, [&](auto t) {
        constexpr int dtype = decltype(t)::value;
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
    });
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
