// out and lse of one block of query rows: online softmax over tiles of keys.
// Milakov and Gimelshein (2018); Dao, "FlashAttention-2" (2023), algorithm 1.
#pragma once
#include "score.inl.h"

namespace anyattn {
namespace {

template <class M>
struct ForwardScratch {
    using C = typename M::C;
    int64_t packed_size, out_size;  // of one panel
    typename M::Packed *q;
    C *out, *S, *added, *keep;
    C *m, *l, *alpha;  // per row: maximum, sum, rescale of this tile
    char *k, *v;

    ForwardScratch(const anyattn_call &call, Arena &arena) {
        const int64_t tile = kTileKeys * panel<C>;
        packed_size = M::packed_size(call.head_dim);
        out_size = round_up(call.head_dim_v, lanes<C>) * panel<C>;
        q = arena.take<typename M::Packed>(packed_size * (kBlockQ / panel<C>));
        out = arena.take<C>(out_size * (kBlockQ / panel<C>));
        S = arena.take<C>(tile);
        added = call.bias.data || call.mask.data ? arena.take<C>(tile) : nullptr;
        keep = call.dropout_threshold ? arena.take<C>(tile) : nullptr;
        m = arena.take<C>(kBlockQ);
        l = arena.take<C>(kBlockQ);
        alpha = arena.take<C>(kBlockQ);
        k = arena.take<char>(M::key_buffer(call.head_dim, kSumDim));
        v = arena.take<char>(M::key_buffer(call.head_dim_v, kSumKeys));
    }
};

// S to P in place; m, l and alpha of the panel for its new maximum. Rows where nothing was seen yet stay at -inf and 0.
// Works on pairs of keys: S has a row to spare.
template <class M>
ANYATTN_NOINLINE void softmax_pass(typename M::C *S, int64_t n, int vectors, typename M::C factor,
                                   const typename M::V *top, typename M::C *keep, typename M::C *m, typename M::C *l,
                                   typename M::C *alpha) {
    using C = typename M::C;
    using V = typename M::V;
    constexpr int width = lanes<C>;
    for (int c = 0; c < vectors; ++c) {
        const V before = load<V>(m + c * width), now = larger(before, top[c] * splat(factor));
        const V base = now == splat(-infinity(C())) ? V{} : now;
        const V rescale = exp2(before - base);
        V sum0{}, sum1{};
        if (n % 2) {
            store(S + n * panel<C> + c * width, splat(-infinity(C())));
            if (keep) store(keep + n * panel<C> + c * width, V{});
        }
        for (int64_t j = 0; j < n; j += 2) {
            const int64_t at = j * panel<C> + c * width;
            V p0 = exp2(load<V>(S + at) * splat(factor) - base);
            V p1 = exp2(load<V>(S + at + panel<C>) * splat(factor) - base);
            sum0 += p0;
            sum1 += p1;
            if (keep) {
                p0 *= load<V>(keep + at);
                p1 *= load<V>(keep + at + panel<C>);
            }
            M::store_p(S, j, c, p0, p1);
        }
        store(m + c * width, now);
        store(l + c * width, load<V>(l + c * width) * rescale + (sum0 + sum1));
        store(alpha + c * width, rescale);
    }
}

// The sink joins the sum; alpha becomes what the sums of values are divided by, inverted; lse where asked for.
template <class C>
ANYATTN_NOINLINE void finish_rows(const Block<C> &block, C *m, C *l, C *alpha) {
    using V = typename Lanes<C>::V;
    const C sink = block.sink();
    for (int c = 0; c < block.rows; c += lanes<C>) {
        const V before = load<V>(m + c), logit = splat(sink) * splat(C(kLog2e));
        const V now = larger(before, logit), base = now == splat(-infinity(C())) ? V{} : now;
        const V rescale = exp2(before - base), sum = load<V>(l + c) * rescale + exp2(logit - base);
        store(m + c, now);
        store(l + c, sum);
        store(alpha + c, sum == V{} ? V{} : rescale / sum);
    }
    if (!block.call.lse.data) return;
    const Rows lse = row_values(block.call.lse, block.call, block.s, block.h, block.i0);
    for (int i = 0; i < block.rows; ++i) {
        const double value = l[i] == 0 ? -infinity(0.0) : double(m[i]) * kLn2 + __builtin_log(double(l[i]));
        store(lse.row(i), C(value));
    }
}

template <class M>
void forward_block(const anyattn_call &call, int64_t b, int64_t h, int64_t index, void *memory) {
    using C = typename M::C;
    using V = typename M::V;
    const Block<C> block(call, sequence(call, b), h, index);
    Arena arena{static_cast<char *>(memory), 0};
    const ForwardScratch<M> w(call, arena);
    const Rows q = query_rows(call.q, call, block.s, h, block.i0);
    for (int p = 0; p < block.panels; ++p) {
        const Rows rows{q.row(p * panel<C>), q.stride, q.dtype};
        M::pack(w.q + p * w.packed_size, rows, block.panel_rows(p), call.head_dim, M::query_factor(call.scale));
    }
    __builtin_memset(w.out, 0, (size_t)(block.panels * w.out_size * (int64_t)sizeof(C)));
    for (int i = 0; i < kBlockQ; ++i) {
        w.m[i] = -infinity(C());
        w.l[i] = 0;
    }
    const KeyRows k = key_rows(call.k, call, block.s, block.h_kv), v = key_rows(call.v, call, block.s, block.h_kv);
    for (int64_t j0 = block.begin; j0 < block.end; j0 += kKeys) {
        const int64_t j1 = min64(j0 + kKeys, block.end);
        const auto keys = M::load_keys(k, j0, j1 - j0, call.head_dim, kSumDim, w.k);
        const auto values = M::load_keys(v, j0, j1 - j0, call.head_dim_v, kSumKeys, w.v);
        for (int p = 0; p < block.panels; ++p) {
            const int64_t first = block.panel_begin(p, j0), n = block.panel_end(p, j1) - first, row = p * panel<C>;
            if (n <= 0) continue;
            const int vectors = block.panel_vectors(p);
            V top[kPanelVectors];
            for (V &x : top) x = splat(-infinity(C()));
            M::scores(keys, first - j0, n, call.head_dim, w.q + p * w.packed_size, vectors, w.S, top);
            const C factor =
                score_tile(block, p, first, n, M::score_factor(call.scale), w.added, (C *)nullptr, w.S, top);
            if (w.keep) keep_tile(w.keep, block, p, first, n);
            softmax_pass<M>(w.S, n, vectors, factor, top, w.keep, w.m + row, w.l + row, w.alpha + row);
            M::accumulate(values, first - j0, n, call.head_dim_v, w.S, vectors, w.out + p * w.out_size, w.alpha + row);
        }
    }
    finish_rows(block, w.m, w.l, w.alpha);
    const Rows out = query_rows(call.out, call, block.s, h, block.i0);
    for (int p = 0; p < block.panels; ++p) {
        const Rows rows{out.row(p * panel<C>), out.stride, out.dtype};
        unpack_panel(rows, w.out + p * w.out_size, block.panel_rows(p), call.head_dim_v, w.alpha + p * panel<C>, false);
    }
}

}  // namespace
}  // namespace anyattn
