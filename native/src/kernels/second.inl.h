// Gradients of <dout, tout> + <dlse, tlse>, given the tangent (tout, tlse): one sweep like that of the backward pass, with
// up to ten products for each tile. With u, f' and f'' the tangent of the scores and the derivatives of the softcap at t,
// x the tangent before the softcap, w = D <do, v>, e = D <do, tv>, delta = <do, o> - dlse and g = <do, tout>:
//     ds = P (w - delta)                      ds' = P ((u - tlse) (w - delta) + e - g)       dbias' = ds'
//     dt = f' ds   dt' = f' ds' + f'' x ds    dv' = sum_i P D (u - tlse) do_i
//     dq' = scale sum_j (dt' k_j + dt tk_j)   dk' = scale sum_i (dt' q_i + dt tq_i)
// 16-bit inputs are multiplied in float32. With a score function, second_pass computes ds' and ds of a tile whose products
// were multiplied by f', and FunctionTile the rest.
#pragma once
#include "dbias.inl.h"
#include "tangent.inl.h"

namespace anyattn {
namespace {

// Per row of a block: tlse and <do, tout>.
template <class C>
struct TangentRows {
    alignas(64) C tlse[kBlockQ], g[kBlockQ];

    template <int P>
    explicit TangentRows(const ScoreBlock<C, P> &block) {
        const anyattn_call &call = block.call;
        const StridedRows tlse_rows = block.strided_values(call.tlse);
        fill_products(block, call.dout, call.tout, g);
        for (int i = 0; i < kBlockQ; ++i) tlse[i] = i < block.rows ? load<C>(tlse_rows.row(i)) : C(0);
    }
};

// Derivatives of a score function of a panel and n keys, and the products x of its tangent.
template <class C, int P>
struct FunctionTile {
    using V = typename Lanes<C>::V;
    int64_t n;
    const C *slopes;
    C *curvatures;  // f'', then f'' x
    C *x;  // products; null: none. Then f' times products
    const C *t;  // scores before score_mod; null: no gradients of captured arrays
    C *tangents;  // of t
    C per_cap;  // 1 / softcap, or 0

    // Multiplies products and derivatives. more: null, or products that x sums; scale: of products.
    ANYATTN_NOINLINE void before(const C *more, C scale) const {
        for (int64_t at = 0; x && at < n * P; at += lanes<C>) {
            const V sum = more ? load<V>(x + at) + load<V>(more + at) : load<V>(x + at);
            store(x + at, sum * load<V>(slopes + at));
            store(curvatures + at, sum * splat(scale) * load<V>(curvatures + at));
            if (!t) continue;
            const V capped = load<V>(t + at) * splat(per_cap);
            store(tangents + at, sum * splat(scale) * (splat(C(1)) - capped * capped));
        }
    }
    // Replaces ds' and ds by dt' and dt, and the tangents of t by their products with ds. ds: null without products.
    ANYATTN_NOINLINE void after(C *ds2, C *ds, C scale) const {
        for (int64_t at = 0; at < n * P; at += lanes<C>) {
            V dt2 = term_of(load<V>(ds2 + at), slopes + at);
            if (ds) {
                const V of_score = load<V>(ds + at);
                dt2 += term_of(of_score, curvatures + at);
                if (t) store(tangents + at, term_of(of_score, tangents + at));
                store(ds + at, term_of(of_score, slopes + at) * splat(scale));
            }
            store(ds2 + at, dt2 * splat(scale));
        }
    }
};

template <class M>
struct SecondScratch {
    using C = typename M::C;
    BackwardScratch<M> backward;
    C *S, *T, *X;  // of all panels: products, then P D (u - tlse), dt' and dt; X: of tq and k
    C *U, *E, *added;  // of one panel: products of q and tk, of dout and tv; the tangent of the bias
    C *curvatures;  // of one panel, see FunctionTile
    typename M::Packed *tq;
    char *tq_rows, *tk, *tv;

    SecondScratch(const anyattn_call &call, Arena &arena) : backward(call, 1, arena) {
        constexpr int64_t panels = kBlockQ / M::panel;
        const TangentTerms has(call);
        const int64_t tile = backward.tiles.tile;
        S = arena.take<C>(tile * panels);
        T = arena.take<C>(tile * panels);
        X = has.products() ? arena.take<C>(tile * panels) : nullptr;
        U = has.k ? arena.take<C>(tile) : nullptr;
        E = has.v ? arena.take<C>(tile) : nullptr;
        added = has.bias ? arena.take<C>(tile) : nullptr;
        curvatures = has_score_function(call) ? arena.take<C>(tile) : nullptr;
        tq = has.q ? arena.take<typename M::Packed>(M::packed_size(call.head_dim) * panels) : nullptr;
        tq_rows = has.q ? arena.take<char>(M::row_buffer(call.head_dim)) : nullptr;
        tk = has.k ? arena.take<char>(M::key_buffer(call.head_dim, kSumDim | kSumKeys, M::score_keys)) : nullptr;
        tv = has.v ? arena.take<char>(M::key_buffer(call.head_dim_v, kSumDim, M::score_keys)) : nullptr;
    }
    const BackwardState<M> &state() const { return backward.states[0]; }  // of the one block
};

// Products of a panel and n keys, see the formulas above: s becomes P D (u - tlse), dp becomes dt' (or ds'), and x
// becomes dt. y: more products that x sums; e, tbias, tanhs and keep: tiles; null where the term is absent.
template <class C>
struct SecondTile {
    C *s, *dp, *x;
    const C *y, *e, *tbias, *tanhs, *keep;
    int64_t n;
    int vectors;
    bool has_q;  // x holds products
    C factor, x_scale;  // of S and of x
    C scale, two_per_cap;  // of dt and dt'
    bool bias_gradient;  // dp becomes ds'
};

template <class M>
ANYATTN_NOINLINE void second_pass(const SecondTile<typename M::C> &tile, const RowStatistics<typename M::C> &rows,
                                  const TangentRows<typename M::C> &tangent, int64_t row) {
    using C = typename M::C;
    using V = typename M::V;
    const V one = splat(C(1));
    for (int c = 0; c < tile.vectors; ++c) {
        const int64_t lane = row + c * lanes<C>;
        const V base = load<V>(rows.base + lane), rest = load<V>(rows.rest + lane), delta = load<V>(rows.delta + lane);
        const V tlse = load<V>(tangent.tlse + lane), g = load<V>(tangent.g + lane);
        for (int64_t j = 0, at = c * lanes<C>; j < tile.n; ++j, at += M::panel) {
            const V p = exp2((load<V>(tile.s + at) - base) * splat(tile.factor) - rest);
            const V kept = tile.keep ? load<V>(tile.keep + at) : one;
            const V t = tile.tanhs ? load<V>(tile.tanhs + at) : V{}, slope = one - t * t;
            V x{};
            if (tile.has_q) x = load<V>(tile.x + at);
            if (tile.y) x += load<V>(tile.y + at);
            x *= splat(tile.x_scale);
            V u = x * slope;
            if (tile.tbias) u += load<V>(tile.tbias + at);
            u = p == V{} ? V{} : u;  // the tangent of a masked key may be NaN, or infinite
            const V centred = u - tlse, dp = load<V>(tile.dp + at) * kept - delta;
            V inner = centred * dp - g;
            if (tile.e) inner += load<V>(tile.e + at) * kept;
            const V ds = p * dp, ds2 = p * inner;
            store(tile.s + at, p * kept * centred);
            if (tile.bias_gradient) {
                store(tile.dp + at, ds2);
                continue;
            }
            V dt2 = ds2 * slope;
            if (tile.tanhs) dt2 -= p == V{} ? V{} : x * ds * (splat(tile.two_per_cap) * t * slope);
            store(tile.dp + at, dt2 * splat(tile.scale));
            if (tile.x) store(tile.x + at, ds * slope * splat(tile.scale));
        }
    }
}

// Keys, values and their tangents of one tile.
template <class M>
struct SecondKeys {
    KeyRows k, v, tk, tv;
    typename M::Keys k_tile, v_tile, tk_tile, tv_tile;

    explicit SecondKeys(const Block<M> &block)
        : k(block.keys(block.call.k)),
          v(block.keys(block.call.v)),
          tk(block.keys(block.call.tk)),
          tv(block.keys(block.call.tv)) {}

    void load(const anyattn_call &call, const SecondScratch<M> &w, int64_t j0, int64_t n) {
        k_tile = M::load_keys(k, j0, n, call.head_dim, kSumDim | kSumKeys, w.backward.tiles.k);
        v_tile = M::load_keys(v, j0, n, call.head_dim_v, kSumDim, w.backward.tiles.v);
        if (call.tk.data) tk_tile = M::load_keys(tk, j0, n, call.head_dim, kSumDim | kSumKeys, w.tk);
        if (call.tv.data) tv_tile = M::load_keys(tv, j0, n, call.head_dim_v, kSumDim, w.tv);
    }
};

// The weights of panel p and keys [j0, j1) in S, T and X; zero for keys that the panel does not see. Returns those that
// it may see.
template <class M>
Range fill_second(const Block<M> &block, const SecondScratch<M> &w, const SecondKeys<M> &keys,
                  const TangentRows<typename M::C> &tangent, int p, int64_t j0, int64_t j1, bool bias_gradient,
                  TileAhead &next) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    const TileScratch<M> &tiles = w.backward.tiles;
    const BackwardRows<M> &packed = w.state().packed;
    const TangentTerms has(call);
    const auto [first, n, use] = visible_keys(block, p, j0, j1, M::key_step);
    const Range range{first - j0, n};
    C *const all_weights[] = {w.S, w.T, w.X};
    for (C *weights : all_weights) {
        if (!weights) continue;
        C *of_panel = weights + p * tiles.tile, *behind = of_panel + (range.first + n) * M::panel;
        __builtin_memset(of_panel, 0, sizeof(C) * (size_t)(range.first * M::panel));
        __builtin_memset(behind, 0, sizeof(C) * (size_t)((j1 - j0 - range.first - n) * M::panel));
    }
    if (n == 0) return range;
    const int64_t offset = p * tiles.tile + range.first * M::panel;
    C *S = w.S + offset, *T = w.T + offset, *X = w.X ? w.X + offset : nullptr;
    const C *q = packed.q + p * packed.q_size, *dout = packed.dout + p * packed.dout_size;
    typename M::V top[kPanelVectors] = {};
    TileAhead none{};
    const int rows = block.panel_rows(p);
    M::scores(keys.k_tile, range.first, n, call.head_dim, q, rows, S, top, next);
    M::scores(keys.v_tile, range.first, n, call.head_dim_v, dout, rows, T, top, none);
    if (has.q) M::scores(keys.k_tile, range.first, n, call.head_dim, w.tq + p * packed.q_size, rows, X, top, none);
    if (has.k) M::scores(keys.tk_tile, range.first, n, call.head_dim, q, rows, w.U, top, none);
    if (has.v) M::scores(keys.tv_tile, range.first, n, call.head_dim_v, dout, rows, w.E, top, none);
    const bool scored = has_score_function(call);
    C *const t = tiles.captured && !bias_gradient ? tiles.t : nullptr;
    score_tile(block, p, first, n, use, tiles.added, tiles.tanhs, {tiles.registers, t, w.curvatures}, S, top);
    if (tiles.keep) keep_tile(tiles.keep, block, p, first, n);
    if (has.bias) fill_tangent_of_bias(w.added, block, p, first, n);
    const C two_per_cap = block.cap != 0 ? 2 / block.cap : 0, per_cap = block.cap != 0 ? 1 / block.cap : 0;
    const C x_scale = C(M::score_factor(call.scale));
    const FunctionTile<C, M::panel> function{n, tiles.tanhs, w.curvatures, has.q ? X : w.U, t, tiles.ds, per_cap};
    SecondTile<C> tile{S,           T,
                       X,           w.U,
                       w.E,         w.added,
                       tiles.tanhs, tiles.keep,
                       n,           block.panel_vectors(p),
                       has.q,       block.units.factor,
                       x_scale,     C(call.scale),
                       two_per_cap, bias_gradient};
    if (scored) {
        function.before(has.q ? w.U : nullptr, x_scale);
        if (has.q) tile.y = nullptr;
        tile.tanhs = nullptr;
        tile.scale = 1;
    }
    second_pass<M>(tile, RowStatistics<C>(packed.rows), tangent, p * M::panel);
    if (!scored || bias_gradient) return range;
    if (t) capture_pass(block, kScoreCapture, p, first, n, t, T, tiles.registers, tiles.captured);
    function.after(T, X, C(call.scale));
    if (t && X && score_section(call, kScoreSecondCapture).terms > 0) {
        capture_pass(block, kScoreSecondCapture, p, first, n, t, tiles.ds, tiles.registers, tiles.captured);
    }
    return range;
}

// Adds the parts of dsink of a block's heads, `step` apart.
template <class C, int P>
void add_second_sinks(const ScoreBlock<C, P> &block, const RowStatistics<C> &rows, const TangentRows<C> &tangent,
                      double *sums, int64_t step) {
    const anyattn_array &tsink = block.call.tsink;
    for (int i = 0; i < block.rows; ++i) {
        const double t = tsink.data ? double(block.head_value(tsink, block.head(i), 0)) : 0.0;
        const double terms = (t - double(tangent.tlse[i])) * double(rows.delta[i]) + double(tangent.g[i]);
        sums[(block.head(i) - block.h) * step] -= double(rows.sink[i]) * terms;
    }
}

template <class M>
void pack_second(const Block<M> &block, const SecondScratch<M> &w) {
    const BackwardRows<M> &packed = w.state().packed;
    pack_rows<M>(block, packed);
    if (w.tq) pack_queries<M>(block, block.call.tq, w.tq, packed.q_size);
}

template <class M>
void second_block(const Block<M> &block, const SecondScratch<M> &w, const Partial &partial, double *sink_sums,
                  int64_t sink_step, void *statistics, const Visit &visit) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    const BackwardScratch<M> &back = w.backward;
    const BackwardState<M> &state = w.state();
    const TileScratch<M> &tiles = back.tiles;
    const RowStatistics<C> rows(state.packed.rows);
    pack_second<M>(block, w);
    fill_statistics<M>(block, state.packed, tiles);
    const TangentRows<C> tangent(block);
    if (statistics && visit.first) store_statistics(block, rows, statistics);
    if (sink_sums && visit.first) add_second_sinks(block, rows, tangent, sink_sums, sink_step);
    const auto q_rows = M::load_rows(block.strided(call.q), block.rows, call.head_dim, state.q_rows);
    const auto dout_rows = M::load_rows(block.strided(call.dout), block.rows, call.head_dim_v, state.dout_rows);
    const auto tq_rows = w.tq ? M::load_rows(block.strided(call.tq), block.rows, call.head_dim, w.tq_rows) : q_rows;
    start_dq<M>(block, state, visit);
    SecondKeys<M> keys(block);
    TileAhead none{};
    for (int64_t j0 = visit.begin; j0 < visit.end && !stopped(call); j0 += M::score_keys) {
        const int64_t j1 = min64(j0 + M::score_keys, visit.end), n = j1 - j0;
        if (hidden_by_function(block, j0, j1)) continue;
        keys.load(call, w, j0, n);
        TileAhead next = next_tile(call, &keys.k, &keys.v, 1, j1, min64(j1 + M::score_keys, visit.end));
        for (int p = 0; p < block.panels; ++p) {
            const Range r = fill_second<M>(block, w, keys, tangent, p, j0, j1, false, next);
            const int64_t at = p * tiles.tile + r.first * M::panel;
            C *dq = state.dq + p * state.dq_size;
            const int count = block.panel_rows(p);
            M::accumulate(keys.k_tile, r.first, r.n, call.head_dim, w.T + at, count, dq, nullptr, none);
            if (w.tk) M::accumulate(keys.tk_tile, r.first, r.n, call.head_dim, w.X + at, count, dq, nullptr, none);
        }
        const Partial to = sums_of_tile<M>(block, back, partial, j0, n);
        C *dk = static_cast<C *>(to.dk), *dv = static_cast<C *>(to.dv);
        M::accumulate_rows(w.S, n, dout_rows, block.rows, call.head_dim_v, dv, to.dv_stride);
        M::accumulate_rows(w.T, n, q_rows, block.rows, call.head_dim, dk, to.dk_stride);
        if (w.tq) M::accumulate_rows(w.X, n, tq_rows, block.rows, call.head_dim, dk, to.dk_stride);
        if (!block.slots) continue;
        add_to_slots<C>(partial.dk, partial.dk_stride, to.dk, to.dk_stride, block.slots + j0, n);
        add_to_slots<C>(partial.dv, partial.dv_stride, to.dv, to.dv_stride, block.slots + j0, n);
    }
    finish_block<M>(block, state, visit);
}

// The rows of a block of queries, one query and the heads that share its keys at a time.
template <class M>
void second_rows(const anyattn_call &call, const Sequence &s, int64_t h_kv, int64_t at, const Partial &partial,
                 double *sink_sums, void *statistics, const SecondScratch<M> &w) {
    const int64_t group = call.nheads / call.nheads_kv, blocks = (s.n_q + kBlockQ - 1) / kBlockQ;
    for (int64_t i = at * kBlockQ; i < min64((at + 1) * kBlockQ, s.n_q); ++i) {
        for (int64_t first = 0; first < group; first += kBlockQ) {
            const QueryBlock row{s.index, h_kv * group + first, min64(kBlockQ, group - first), i, 1};
            const Block<M> block(call, row, M::score_factor(call.scale));
            second_block<M>(block, w, partial, sink_sums ? sink_sums + first * blocks + at : nullptr, blocks,
                            statistics, {block.begin, block.end, true, true, nullptr});
        }
    }
}

template <class M>
void second_group(const anyattn_call &call, const BackwardPart &part, const Partial &partial, double *sink_sums,
                  void *statistics, void *memory) {
    const Sequence s = sequence(call, part.b);
    const int64_t group = call.nheads / call.nheads_kv, blocks = (s.n_q + kBlockQ - 1) / kBlockQ;
    Arena arena{static_cast<char *>(memory), 0};
    SecondScratch<M> w(call, arena);
    w.backward.tiles.captured = part.captured;
    for (int64_t at = part.first; at < part.end && !stopped(call); at += part.step) {
        if (has_key_lists(call)) {
            second_rows<M>(call, s, part.h_kv, at, partial, sink_sums, statistics, w);
            continue;
        }
        const QueryBlock rows = query_block(s, part.h_kv * group + at / blocks, at % blocks);
        const Block<M> block(call, rows, M::score_factor(call.scale));
        const Visit visit = visit_of<M>(block, part, at);
        if (!visit.first && block.end <= part.key_begin) continue;
        second_block<M>(block, w, partial, sink_sums ? sink_sums + at : nullptr, blocks, statistics, visit);
    }
}

template <class M>
struct SecondDbias {
    SecondScratch<M> second;
    double *sum;  // see DbiasScratch

    SecondDbias(const anyattn_call &call, Arena &arena) : second(call, arena) {
        sum = arena.take<double>(M::score_keys * kBlockQ);
    }
};

// Adds ds' of a block and keys [begin, end).
template <class M>
void add_dbias(const Block<M> &block, const DbiasTile &tile, const SecondDbias<M> &w, int64_t begin, int64_t end,
               const void *statistics) {
    using C = typename M::C;
    const SecondScratch<M> &second = w.second;
    const TileScratch<M> &tiles = second.backward.tiles;
    pack_second<M>(block, second);
    load_statistics(block, statistics, RowStatistics<C>(second.state().packed.rows));
    const TangentRows<C> tangent(block);
    SecondKeys<M> keys(block);
    TileAhead none{};
    for (int64_t j0 = begin; j0 < end && !stopped(block.call); j0 += M::score_keys) {
        const int64_t n = min64(M::score_keys, end - j0);
        keys.load(block.call, second, j0, n);
        for (int p = 0; p < block.panels; ++p) {
            const Range r = fill_second<M>(block, second, keys, tangent, p, j0, j0 + n, true, none);
            const C *ds = second.T + p * tiles.tile + r.first * M::panel;
            add_panel(w.sum, tile, block, p, j0 + r.first, r.n, ds);
        }
    }
}

}  // namespace
}  // namespace anyattn
