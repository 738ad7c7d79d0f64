// Online softmax: the weights of a tile of keys relative to the largest score so far.
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once
#include "scales.inl.h"
#include "score_tile.inl.h"

namespace anyattn {
namespace {

// Stores the weights of n keys in vector c of a panel, relative to `base`, in P. Returns their sum before dropout.
template <class M>
ANYATTN_INLINE typename M::V weigh(const typename M::C *S, typename M::C *P, int64_t n, int c, typename M::V scale,
                                   typename M::V base, const typename M::C *keep) {
    using C = typename M::C;
    using V = typename M::V;
    V sum0{}, sum1{};
    for (int64_t j = 0; j < n; j += 2) {
        const int64_t at = j * M::panel + c * lanes<C>;
        V p0 = M::weight(load<V>(S + at) - base, scale);
        V p1 = M::weight(load<V>(S + at + M::panel) - base, scale);
        sum0 += p0;
        sum1 += p1;
        if (keep) {
            p0 *= load<V>(keep + at);
            p1 *= load<V>(keep + at + M::panel);
        }
        M::store_p(P, j, c, p0, p1);
    }
    return sum0 + sum1;
}

// Largest sum of weights for which the base stays. Such a sum and its weights are far from overflow.
constexpr float kLargestSum = 256;

// Returns the base, increased in the lanes whose sum of weights is large, infinite or NaN.
template <class M>
ANYATTN_NOINLINE typename M::V risen_base(const typename M::C *S, int64_t n, int c, typename M::V before,
                                          typename M::V sum) {
    using C = typename M::C;
    using V = typename M::V;
    V top = before;
    for (int64_t j = 0; j < n; ++j) top = larger(top, load<V>(S + j * M::panel + c * lanes<C>));
    return sum <= splat(C(kLargestSum)) ? before : top;
}

// The base of weights for a maximum. A maximum that overflows in log2 units masks the row's keys, because their exponents are
// -inf.
template <class V>
ANYATTN_INLINE V usable_base(V m, V scale) {
    return m * scale == splat(-infinity(m[0])) ? V{} : m;
}

// Replaces S by P, and updates m, l and alpha of the panel for its new base. Rows without visible keys so far keep l = 0.
// Exponents are factor (S - m), which is exactly 0 for the base. Works on pairs of keys, for which S has a spare row.
// The base m is the largest score so far if the products find it (M::finds_top). Otherwise weights are computed with the
// current base, and again with a higher one if their sum is too large.
template <class M>
ANYATTN_NOINLINE void softmax_pass(typename M::C *S, typename M::C *P, int64_t n, int vectors, typename M::C factor,
                                   const typename M::V *top, typename M::C *keep, typename M::C *m, typename M::C *l,
                                   typename M::C *alpha) {
    using C = typename M::C;
    using V = typename M::V;
    constexpr int width = lanes<C>;
    const V scale = splat(factor);
    const auto usable = [&](V m) { return usable_base(m, scale); };
    for (int c = 0; c < vectors; ++c) {
        if (n % 2) {
            store(S + n * M::panel + c * width, splat(-infinity(C())));
            if (keep) store(keep + n * M::panel + c * width, V{});
        }
        const V before = load<V>(m + c * width);
        V now = before, sum{};
        if constexpr (M::finds_top) {
            now = larger(before, top[c]);
            sum = weigh<M>(S, P, n, c, scale, usable(now), keep);
        } else {
            // The base is -inf before the first visible key, and if it overflows in log2 units, which gives an infinite sum.
            sum = weigh<M>(S, P, n, c, scale, now * scale == splat(-infinity(C())) ? splat(-infinity(C())) : now, keep);
            if (any_exceeds(sum, splat(C(kLargestSum)))) {
                now = risen_base<M>(S, n, c, before, sum);
                sum = weigh<M>(S, P, n, c, scale, usable(now), keep);
            }
        }
        const V rescale = exp2(before - usable(now), scale);
        store(m + c * width, now);
        store(l + c * width, load<V>(l + c * width) * rescale + sum);
        store(alpha + c * width, rescale);
    }
}

// Resets the maxima and sums to those of rows without visible keys.
template <class C>
void clear_sums(C *m, C *l) {
    for (int i = 0; i < kBlockQ; ++i) {
        m[i] = -infinity(C());
        l[i] = 0;
    }
}

// Memory for the softmax of a block: a tile of one panel, and for each row its maximum, its sum of weights, and alpha,
// the factor that rescales its sums of values after a tile.
template <class M>
struct SoftmaxRows {
    using C = typename M::C;
    C *S, *P, *added, *keep;  // P: S itself, if M stores weights there; keep: null, or the dropout factors
    C *registers;  // of a score program, or null
    C *m, *l, *alpha;
    const C *k_scale = nullptr, *v_scale = nullptr;  // of the tile's keys; null: not quantised

    // Adds keys [j, j + n) of the tile that begins at j0 to the rows of panel p, and stores their weights in P. q: the
    // packed panel.
    void add_keys(const Block<M> &block, int p, const typename M::Keys &keys, int64_t j0, int64_t j, int64_t n,
                  MaskUse use, const typename M::Packed *q, TileAhead &next) const {
        typename M::V top[kPanelVectors];
        for (auto &x : top) x = splat(-infinity(C()));
        const AddedAhead added_ahead(block, p, j, n, next);
        M::scores(keys, j - j0, n, block.call.head_dim, q, block.panel_rows(p), S, top, next);
        next.bias = next.mask = {};
        if (k_scale) scale_tile<C, M::panel>(S, k_scale + (j - j0), n, block.panel_vectors(p), top);
        score_tile(block, p, j, n, use, added, (C *)nullptr, {registers, nullptr}, S, top);
        if (keep) keep_tile(keep, block, p, j, n);
        const int64_t row = p * M::panel;
        softmax_pass<M>(S, P, n, block.panel_vectors(p), block.units.factor, top, keep, m + row, l + row, alpha + row);
        if constexpr (M::weights_in_scores) {
            if (v_scale) scale_tile<C, M::panel>(P, v_scale + (j - j0), n, block.panel_vectors(p), nullptr);
        }
    }
};

}  // namespace
}  // namespace anyattn
