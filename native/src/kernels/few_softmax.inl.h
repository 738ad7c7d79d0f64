// The softmax of a few rows: dense, so that every lane holds a score. Scores and weights of R rows lie key by key, and a
// vector holds those of K = lanes / R keys. What acts on scores by row and key works on a panel, see SoftmaxRows.
#pragma once
#include <type_traits>

#include "few.inl.h"
#include "softmax.inl.h"

namespace anyattn {
namespace {

// Whether M multiplies a few rows.
template <class M>
constexpr bool kIsFew = std::is_base_of<Few<typename M::C>, M>::value;

// Rows of R elements, `from_stride` and `to_stride` apart. `to` may be `from` if rows come closer together.
template <class C, int R>
ANYATTN_NOINLINE void move_rows(C *to, int64_t to_stride, const C *from, int64_t from_stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        C row[R];
        __builtin_memcpy(row, from + i * from_stride, sizeof row);
        __builtin_memcpy(to + i * to_stride, row, sizeof row);
    }
}

// Multiplies n keys by a scale each.
template <class C, int R>
ANYATTN_INLINE void scale_keys(C *S, const C *scale, int64_t n) {
    constexpr int K = lanes<C> / R;
    using V = typename Lanes<C>::V;
    for (int64_t j = 0; j < n; j += K) store(S + j * R, load<V>(S + j * R) * repeat_keys<C, R>(load<V>(scale + j)));
}

template <class M>
struct FewSoftmax : SoftmaxRows<M> {
    using C = typename M::C;
    using V = typename M::V;
    using SoftmaxRows<M>::S, SoftmaxRows<M>::P, SoftmaxRows<M>::keep, SoftmaxRows<M>::k_scale, SoftmaxRows<M>::v_scale;
    using SoftmaxRows<M>::m, SoftmaxRows<M>::l, SoftmaxRows<M>::alpha;

    // See SoftmaxRows. S is the panel, and P takes the dense scores and weights.
    void add_keys(const Block<M> &block, int p, const typename M::Keys &keys, int64_t j0, int64_t j, int64_t n,
                  MaskUse use, const typename M::Packed *q, TileAhead &next) const {
        M::for_rows(block.rows, [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            M::template scores<R>(keys, j - j0, n, block.call.head_dim, q, P, next);
            if (k_scale) scale_keys<C, R>(P, k_scale + (j - j0), n);
            if (changes_scores(block, p, j, n, use)) change_scores<R>(block, p, j, n, use);
            if (keep) {
                keep_tile(keep, block, p, j, n);
                move_rows<C, R>(keep, R, keep, M::panel, n);
            }
            weigh<R>(n, block.units.factor, v_scale ? v_scale + (j - j0) : nullptr);
        });
    }

    template <int R>
    ANYATTN_NOINLINE void change_scores(const Block<M> &block, int p, int64_t j, int64_t n, MaskUse use) const {
        V top[kPanelVectors];
        move_rows<C, R>(S, M::panel, P, R, n);
        score_tile(block, p, j, n, use, this->added, (C *)nullptr, {this->registers, nullptr}, S, top);
        move_rows<C, R>(P, R, S, M::panel, n);
    }

    // See softmax_pass. Lane k R + r of m, l and alpha belongs to row r, for every k. Works on pairs of vectors.
    template <int R>
    ANYATTN_NOINLINE void weigh(int64_t n, C factor, const C *scale) const {
        constexpr int width = lanes<C>, K = width / R;
        const int64_t end = round_up(n, 2 * K) * R;
        for (int64_t i = n * R; i < end; ++i) P[i] = -infinity(C());
        for (int64_t i = n * R; keep && i < end; ++i) keep[i] = 0;
        const V before = load<V>(m), units = splat(factor);
        const auto usable = [&](V x) { return x * units == splat(-infinity(C())) ? V{} : x; };
        V top0 = load<V>(P), top1 = top0;
        for (int64_t i = 0; i < end; i += 2 * width) {
            top0 = larger(top0, load<V>(P + i));
            top1 = larger(top1, load<V>(P + i + width));
        }
        const V top = reduce_keys<C, R>(larger(top0, top1), [](V a, V b) { return larger(a, b); });
        const V now = larger(before, top), base = usable(now);
        V sum0{}, sum1{};
        for (int64_t i = 0; i < end; i += 2 * width) {
            V p0 = M::weight(load<V>(P + i) - base, units), p1 = M::weight(load<V>(P + i + width) - base, units);
            sum0 += p0;
            sum1 += p1;
            if (keep) {
                p0 *= load<V>(keep + i);
                p1 *= load<V>(keep + i + width);
            }
            if (scale) {
                p0 *= repeat_keys<C, R>(load<V>(scale + i / R));
                p1 *= repeat_keys<C, R>(load<V>(scale + i / R + K));
            }
            M::store_p(P, i, p0, p1);
        }
        const V sum = reduce_keys<C, R>(sum0 + sum1, [](V a, V b) { return a + b; });
        const V rescale = exp2(before - base, units);
        store(m, now);
        store(l, load<V>(l) * rescale + sum);
        store(alpha, rescale);
    }
};

}  // namespace
}  // namespace anyattn
