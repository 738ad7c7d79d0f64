// The tangent of out and lse in one sweep over the keys. With u the tangent of the scores,
//     tlse_i = sum_j P_ij u_ij + P_sink tsink       tout_i = sum_j P_ij D_ij (u_ij v_j + tv_j) - tlse_i out_i
// Absent tangents are zeros, and nothing is computed for them. P follows from the saved lse, or the same sweep computes out
// and lse too (`online`): then P is relative to the largest score so far, as in softmax.inl.h, and so are all sums.
#pragma once
#include "forward.inl.h"
#include "statistics.inl.h"

namespace anyattn {
namespace {

// Which terms of a tangent a call has.
struct TangentTerms {
    bool q, k, v, bias;

    explicit TangentTerms(const anyattn_call &call)
        : q(call.tq.data), k(call.tk.data), v(call.tv.data), bias(call.tbias.data) {}
    bool products() const { return q || k; }
    bool scores() const { return products() || bias; }
};

// Packed queries, statistics and sums of one block.
template <class M>
struct TangentState {
    using C = typename M::C;
    using Packed = typename M::Packed;
    QueryRows<M> packed;
    Packed *tq;
    C *out, *lse;  // sums, by panel and by row
    ForwardState<M> forward;  // null unless online; its q is not used

    static int64_t out_size(const anyattn_call &call) { return M::out_size(call.head_dim_v); }

    TangentState(const anyattn_call &call, Arena &arena, Arena &if_online)
        : packed(call, arena), forward(call, if_online) {
        constexpr int64_t panels = kBlockQ / M::panel;
        tq = call.tq.data ? arena.take<Packed>(packed.q_size * panels) : nullptr;
        out = arena.take<C>(out_size(call) * panels);
        lse = arena.take<C>(kBlockQ);
    }
};

// Memory that the blocks of a task share, and their states.
template <class M>
struct TangentScratch {
    using C = typename M::C;
    TileScratch<M> tiles;  // S and T: P and P u
    C *U, *added;  // of one panel: products of q and tk; the tangent of the bias
    C *row_sums;  // sums of a block, row by row
    char *v, *tk, *tv;
    Block<M> *blocks;
    TangentState<M> *states;

    TangentScratch(const anyattn_call &call, bool online, int64_t count, Arena &arena) : tiles(call, arena) {
        const TangentTerms has(call);
        U = has.q && has.k ? arena.take<C>(tiles.tile) : nullptr;
        added = has.bias ? arena.take<C>(tiles.tile) : nullptr;
        row_sums = arena.take<C>(kBlockQ * row_stride(call));
        v = online || has.scores() ? arena.take<char>(M::key_buffer(call.head_dim_v, kSumKeys, M::score_keys))
                                   : nullptr;
        tk = has.k ? arena.take<char>(M::key_buffer(call.head_dim, kSumDim, M::score_keys)) : nullptr;
        tv = has.v ? arena.take<char>(M::key_buffer(call.head_dim_v, kSumKeys, M::score_keys)) : nullptr;
        blocks = arena.take<Block<M>>(count);
        states = arena.take<TangentState<M>>(count);
        for (int64_t i = 0; i < count; ++i) {
            Arena none{nullptr, 0};
            const TangentState<M> state(call, arena, online ? arena : none);
            if (arena.base) new (states + i) TangentState<M>(state);
        }
    }
    static int64_t row_stride(const anyattn_call &call) { return round_up(call.head_dim_v, lanes<C>); }
};

// Products of a panel and n keys. x and y: the products that u is the sum of, or null; tbias, tanhs and keep: null, or
// tiles.
template <class C>
struct TangentTile {
    C *S, *T;
    const C *x, *y, *tbias, *tanhs;
    C *keep;
    int64_t n;
    int vectors;
};

// Raises the bases of a panel's rows to their largest scores so far, and sets alpha to the factors of their sums.
template <class M>
void raise_bases(int vectors, typename M::C factor, const typename M::V *top, typename M::C *m, typename M::C *base,
                 typename M::C *alpha) {
    using V = typename M::V;
    const V scale = splat(factor);
    for (int c = 0; c < vectors; ++c) {
        const int64_t at = c * lanes<typename M::C>;
        const V before = load<V>(m + at), now = larger(before, top[c]), usable = usable_base(now, scale);
        store(m + at, now);
        store(base + at, usable);
        store(alpha + at, exp2(before - usable, scale));
    }
}

// Per row of a panel: P is relative to base and rest; lse sums P u. Online, rest is null, l sums P, and alpha are the
// factors of both sums.
template <class C>
struct TangentSums {
    const C *base, *rest;
    C *lse, *l;
    const C *alpha;
};

// Replaces S by P and T by P u, both with dropout, and adds their sums without dropout. Works on pairs of keys.
template <class M, bool online>
ANYATTN_NOINLINE void tangent_pass(const TangentTile<typename M::C> &tile, const TangentTerms &has,
                                   typename M::C factor, typename M::C scale, const TangentSums<typename M::C> &rows) {
    using C = typename M::C;
    using V = typename M::V;
    constexpr int width = lanes<C>;
    for (int c = 0; c < tile.vectors; ++c) {
        const V b = load<V>(rows.base + c * width), r = online ? V{} : load<V>(rows.rest + c * width);
        if (tile.n % 2) {
            store(tile.S + tile.n * M::panel + c * width, splat(-infinity(C())));
            if (tile.keep) store(tile.keep + tile.n * M::panel + c * width, V{});
        }
        V sum[2] = {}, sum_p[2] = {};
        for (int64_t j = 0; j < tile.n; j += 2) {
            V p[2], pu[2];
            ANYATTN_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int64_t at = (j + i) * M::panel + c * width;
                const V s = load<V>(tile.S + at) - b;
                p[i] = online ? M::weight(s, splat(factor)) : exp2(s * splat(factor) - r);
                if (online) sum_p[i] += p[i];
                V u{};
                if (tile.x) u = load<V>(tile.x + at);
                if (tile.y) u += load<V>(tile.y + at);
                u *= splat(scale);
                if (tile.tanhs) u *= softcap_slope(tile.tanhs + at);
                if (tile.tbias) u += load<V>(tile.tbias + at);
                // The tangent of a masked key may be NaN, or infinite.
                pu[i] = p[i] == V{} ? V{} : p[i] * u;
                sum[i] += pu[i];
                if (!tile.keep) continue;
                p[i] *= load<V>(tile.keep + at);
                pu[i] *= load<V>(tile.keep + at);
            }
            if (online || has.v) M::store_p(tile.S, j, c, p[0], p[1]);
            if (has.scores()) M::store_p(tile.T, j, c, pu[0], pu[1]);
        }
        const V alpha = online ? load<V>(rows.alpha + c * width) : splat(C(1));
        store(rows.lse + c * width, load<V>(rows.lse + c * width) * alpha + (sum[0] + sum[1]));
        if (online) store(rows.l + c * width, load<V>(rows.l + c * width) * alpha + (sum_p[0] + sum_p[1]));
    }
}

// Multiplies the sum of products x and y (null: 0) by the derivative of a score function.
template <class C, int P>
ANYATTN_NOINLINE void scale_by_slopes(int64_t n, const C *slopes, const C *y, C *x) {
    using V = typename Lanes<C>::V;
    for (int64_t at = 0; at < n * P; at += lanes<C>) {
        const V sum = y ? load<V>(x + at) + load<V>(y + at) : load<V>(x + at);
        store(x + at, sum * load<V>(slopes + at));
    }
}

// The tangent of the bias for keys [j, j + n) of panel p.
template <class C, int P>
void fill_tangent_of_bias(C *added, const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n) {
    block.for_runs(j, n, [&](int64_t i, int64_t slot, int64_t count) {
        spread(added + i * P, block, p, block.call.tbias, slot, count, [](auto bias, auto) { return bias; });
    });
}

// Keys, values and their tangents of one tile.
template <class M>
struct TangentKeys {
    typename M::Keys k, v, tk, tv;
};

// Adds the keys [j0, j1), one tile, to the sums of a block.
template <class M, bool online>
void attend_tangent(const Block<M> &block, const TangentState<M> &state, const TangentScratch<M> &w,
                    const TangentKeys<M> &keys, int p, int64_t j0, int64_t j1, TileAhead &next) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    const TileScratch<M> &tiles = w.tiles;
    const TangentTerms has(call);
    const auto [first, n, use] = visible_keys(block, p, j0, j1, M::key_step);
    if (n == 0) return;
    const int64_t at = first - j0;
    typename M::V top[kPanelVectors], unused[kPanelVectors] = {};
    for (auto &x : top) x = splat(-infinity(C()));
    TileAhead none{};
    const int rows = block.panel_rows(p);
    const typename M::Packed *q = state.packed.q + p * state.packed.q_size, *tq = state.tq + p * state.packed.q_size;
    M::scores(keys.k, at, n, call.head_dim, q, rows, tiles.S, top, next);
    if (has.q) M::scores(keys.k, at, n, call.head_dim, tq, rows, tiles.T, unused, none);
    if (has.k) M::scores(keys.tk, at, n, call.head_dim, q, rows, has.q ? w.U : tiles.T, unused, none);
    score_tile(block, p, first, n, use, tiles.added, tiles.tanhs, {tiles.registers, nullptr}, tiles.S, top);
    const bool scored = has_score_function(call);
    const C *more = w.U;
    if (scored && has.products()) {
        scale_by_slopes<C, M::panel>(n, tiles.tanhs, more, tiles.T);
        more = nullptr;
    }
    if (tiles.keep) keep_tile(tiles.keep, block, p, first, n);
    if (has.bias) fill_tangent_of_bias(w.added, block, p, first, n);
    const RowStatistics<C> statistics(state.packed.rows);
    const int64_t row = p * M::panel;
    const TangentTile<C> tile{tiles.S,    tiles.T, has.products() ? tiles.T : nullptr,
                              more,       w.added, has.products() && !scored ? tiles.tanhs : nullptr,
                              tiles.keep, n,       block.panel_vectors(p)};
    C *alpha = tiles.alpha + row, *m = state.forward.m + row;
    if (online) raise_bases<M>(block.panel_vectors(p), block.units.factor, top, m, statistics.base + row, alpha);
    tangent_pass<M, online>(
        tile, has, block.units.factor, C(M::score_factor(call.scale)),
        {statistics.base + row, statistics.rest + row, state.lse + row, state.forward.l + row, alpha});
    C *out = state.out + p * state.out_size(call), *of_values = state.forward.out + p * state.out_size(call);
    const C *factors = online ? alpha : nullptr;
    if (online) M::accumulate(keys.v, at, n, call.head_dim_v, tiles.S, rows, of_values, alpha, next);
    if (has.v) M::accumulate(keys.tv, at, n, call.head_dim_v, tiles.S, rows, out, factors, next);
    if (has.scores())
        M::accumulate(keys.v, at, n, call.head_dim_v, tiles.T, rows, out, has.v ? nullptr : factors, next);
}

template <class M, bool online>
void start_tangent(const Block<M> &block, const TangentState<M> &state, const TileScratch<M> &tiles) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    const QueryRows<M> &packed = state.packed;
    pack_queries<M>(block, call.q, packed.q, packed.q_size);
    if (call.tq.data) pack_queries<M>(block, call.tq, state.tq, packed.q_size);
    if (online) {
        __builtin_memset(state.forward.out, 0, (size_t)(block.panels * state.out_size(call) * (int64_t)sizeof(C)));
        clear_sums(state.forward.m, state.forward.l);
    } else if (read_lse(block, RowStatistics<C>(packed.rows)) > largest_trusted_lse(call)) {
        refine_statistics<M>(block, packed, tiles);
    }
    __builtin_memset(state.out, 0, (size_t)(block.panels * state.out_size(call) * (int64_t)sizeof(C)));
    __builtin_memset(state.lse, 0, sizeof(C) * kBlockQ);
}

// Writes tlse and tout: the sums minus tlse out.
template <class M>
void write_tangent(const Block<M> &block, const TangentState<M> &state, typename M::C *row_sums,
                   const typename M::C *alpha) {
    using C = typename M::C;
    using V = typename M::V;
    const anyattn_call &call = block.call;
    const StridedRows out = block.strided(call.out), tout = block.strided(call.tout);
    const StridedRows tlse = block.strided_values(call.tlse);
    const RowStatistics<C> rows(state.packed.rows);
    const int64_t stride = TangentScratch<M>::row_stride(call);
    char *row[kBlockQ];
    for (int r = 0; r < block.rows; ++r) row[r] = reinterpret_cast<char *>(row_sums + r * stride);
    for (int p = 0; p < block.panels; ++p) {
        M::unpack(row + p * M::panel, dtype_of<C>, state.out + p * state.out_size(call), block.panel_rows(p),
                  call.head_dim_v, alpha ? alpha + p * M::panel : nullptr);
    }
    for (int r = 0; r < block.rows; ++r) {
        C lse = alpha ? state.lse[r] * alpha[r] : state.lse[r];
        if (call.tsink.data) lse += rows.sink[r] * block.head_value(call.tsink, block.head(r), 0);
        store(tlse.row(r), lse);
        for (int64_t d = 0; d < call.head_dim_v; d += lanes<C>) {
            const int64_t left = call.head_dim_v - d;
            const V sum = load_part<C>(row[r] + d * (int64_t)sizeof(C), dtype_of<C>, left);
            store_part(tout.at(r, d), tout.dtype, sum - splat(lse) * load_part<C>(out.at(r, d), out.dtype, left), left);
        }
    }
}

// Sets the sink's probability of each row from the results of finish_rows.
template <class M>
void fill_sinks(const Block<M> &block, const TangentState<M> &state) {
    using C = typename M::C;
    const RowStatistics<C> rows(state.packed.rows);
    for (int r = 0; r < block.rows; ++r) {
        const double sink = double(block.sink(r)), gap = double(state.forward.m[r]) * block.units.unit - sink;
        const double weight = __builtin_exp(gap > 0 ? -gap : 0.0) / double(state.forward.l[r]);
        rows.sink[r] = sink == -infinity(0.0) ? C(0) : C(weight);
    }
}

// The blocks of a set begin at the same key.
template <class M, bool online>
void tangent_blocks(const anyattn_call &call, const BlockSet &set, void *memory) {
    Arena arena{static_cast<char *>(memory), 0};
    const TangentScratch<M> w(call, online, set.count(), arena);
    const TangentTerms has(call);
    int64_t end = 0;
    for (int64_t i = 0; i < set.count(); ++i) {
        const QueryBlock rows = block_of(call, set, i);
        start_tangent<M, online>(*new (w.blocks + i) Block<M>(call, rows, M::score_factor(call.scale)), w.states[i],
                                 w.tiles);
        end = max64(end, w.blocks[i].end);
    }
    const Block<M> &first = w.blocks[0];
    const KeyRows k = first.keys(call.k), v = first.keys(call.v);
    const KeyRows tk = first.keys(has.k ? call.tk : call.k), tv = first.keys(has.v ? call.tv : call.v);
    if (!online && !has.scores() && !has.v) end = first.begin;
    for (int64_t j0 = first.begin; j0 < end && !stopped(call); j0 += M::score_keys) {
        const int64_t j1 = min64(j0 + M::score_keys, end), n = j1 - j0;
        if (all_hidden<M>(w.blocks, set.count(), j0, j1)) continue;
        TangentKeys<M> keys{M::load_keys(k, j0, n, call.head_dim, kSumDim, w.tiles.k), {}, {}, {}};
        if (online || has.scores()) keys.v = M::load_keys(v, j0, n, call.head_dim_v, kSumKeys, w.v);
        if (has.k) keys.tk = M::load_keys(tk, j0, n, call.head_dim, kSumDim, w.tk);
        if (has.v) keys.tv = M::load_keys(tv, j0, n, call.head_dim_v, kSumKeys, w.tv);
        TileAhead next = next_tile(call, &k, &v, 1, j1, min64(j1 + M::score_keys, end));
        for (int64_t i = 0; i < set.count(); ++i) {
            for (int p = 0; p < w.blocks[i].panels; ++p) {
                attend_tangent<M, online>(w.blocks[i], w.states[i], w, keys, p, j0, j1, next);
            }
        }
    }
    for (int64_t i = 0; i < set.count(); ++i) {
        const Block<M> &block = w.blocks[i];
        const TangentState<M> &state = w.states[i];
        if (online) {
            write_block<M>(block, state.forward, w.tiles.alpha, nullptr);
            fill_sinks<M>(block, state);
        }
        write_tangent<M>(block, state, w.row_sums, online ? w.tiles.alpha : nullptr);
    }
}

}  // namespace
}  // namespace anyattn
