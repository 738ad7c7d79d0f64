// Online softmax: the weights of a tile of keys relative to the largest score so far.
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once
#include "score.inl.h"

namespace anyattn {
namespace {

// S to P in place; m, l and alpha of the panel for its new maximum. Rows where nothing was seen yet stay at l = 0.
// Exponents are factor (S - m): exactly 0 for the maximum, whatever its size. Works on pairs of keys: S has a row to
// spare.
template <class M>
ANYATTN_NOINLINE void softmax_pass(typename M::C *S, int64_t n, int vectors, typename M::C factor,
                                   const typename M::V *top, typename M::C *keep, typename M::C *m, typename M::C *l,
                                   typename M::C *alpha) {
    using C = typename M::C;
    using V = typename M::V;
    constexpr int width = lanes<C>;
    const V scale = splat(factor);
    for (int c = 0; c < vectors; ++c) {
        const V before = load<V>(m + c * width), now = larger(before, top[c]);
        // A maximum that overflows in log2 units hides the row's keys: their exponents are -inf.
        const V base = now * scale == splat(-infinity(C())) ? V{} : now;
        const V rescale = exp2(before - base, scale);
        V sum0{}, sum1{};
        if (n % 2) {
            store(S + n * panel<C> + c * width, splat(-infinity(C())));
            if (keep) store(keep + n * panel<C> + c * width, V{});
        }
        for (int64_t j = 0; j < n; j += 2) {
            const int64_t at = j * panel<C> + c * width;
            V p0 = exp2(load<V>(S + at) - base, scale);
            V p1 = exp2(load<V>(S + at + panel<C>) - base, scale);
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

// Rows that have seen no key.
template <class C>
void clear_sums(C *m, C *l) {
    for (int i = 0; i < kBlockQ; ++i) {
        m[i] = -infinity(C());
        l[i] = 0;
    }
}

// What the softmax of a block needs: a tile of one panel, and per row its maximum, its sum of weights and what its
// sums of values are multiplied by after a tile.
template <class M>
struct SoftmaxRows {
    using C = typename M::C;
    C *S, *added, *keep;  // keep: null, or the dropout factors
    C *m, *l, *alpha;

    // Adds keys [j, j + n) of the tile that begins at j0 to the rows of panel p; leaves P in S. q: the packed panel.
    void add_keys(const ScoreBlock<C> &block, int p, const typename M::Keys &keys, int64_t j0, int64_t j, int64_t n,
                  MaskUse use, const typename M::Packed *q, TileAhead &next) const {
        typename M::V top[kPanelVectors];
        for (auto &x : top) x = splat(-infinity(C()));
        M::scores(keys, j - j0, n, block.call.head_dim, q, block.panel_rows(p), S, top, next);
        score_tile(block, p, j, n, use, added, (C *)nullptr, S, top);
        if (keep) keep_tile(keep, block, p, j, n);
        const int64_t row = p * panel<C>;
        softmax_pass<M>(S, n, block.panel_vectors(p), block.units.factor, top, keep, m + row, l + row, alpha + row);
    }
};

}  // namespace
}  // namespace anyattn
