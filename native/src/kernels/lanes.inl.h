// Rearrangements of the lanes of vectors that hold the scores of a few rows: lane k R + r is row r of key k.
#pragma once
#include <utility>

#include "vector.inl.h"

namespace anyattn {
namespace {

// Lane i is element Index::of(i) of a, or of b for indices from the number of lanes on.
template <class Index, class V, int... I>
ANYATTN_INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, Index::of(I)...);
}

template <class C, class Index>
ANYATTN_INLINE typename Lanes<C>::V shuffle(typename Lanes<C>::V a, typename Lanes<C>::V b) {
    return shuffle<Index>(a, b, std::make_integer_sequence<int, lanes<C>>());
}

// Half of the pairs of neighbouring groups of S lanes in a and in b: their first groups, or their second ones. Groups
// smaller than 16 bytes alternate between a and b in each 16 bytes, because the instructions for that are cheap.
template <class C, int S, bool second>
struct HalfOfPairs {
    static constexpr int unit = 16 / (int)sizeof(C);
    static constexpr int of(int i) {
        if (S >= unit)
            return i / S * 2 % (lanes<C> / S) * S + i % S + (second ? S : 0) + (i < lanes<C> / 2 ? 0 : lanes<C>);
        const int group = i % unit / S, half = second ? unit / 2 : 0;
        return i / unit * unit + group / 2 * S + i % S + half + group % 2 * lanes<C>;
    }
};

// Replaces r[0 .. N) by N / 2 vectors with half as many partial sums of each.
template <class C, int N, int S>
ANYATTN_INLINE void add_pairs(typename Lanes<C>::V *r) {
    ANYATTN_UNROLL
    for (int i = 0; i < N / 2; ++i) {
        r[i] = shuffle<C, HalfOfPairs<C, S, false>>(r[2 * i], r[2 * i + 1]) +
               shuffle<C, HalfOfPairs<C, S, true>>(r[2 * i], r[2 * i + 1]);
    }
}

// Lane i: the sum of the lanes of r[i].
template <class C, int N = lanes<C>, int S = 1>
ANYATTN_INLINE typename Lanes<C>::V sum_each(typename Lanes<C>::V *r) {
    if constexpr (N == 1) {
        return r[0];
    } else {
        add_pairs<C, N, S>(r);
        return sum_each<C, N / 2, (S * (int)sizeof(C) < 16 ? 2 * S : S)>(r);
    }
}

template <int R>
struct KeyOfLane {
    static constexpr int of(int i) { return i / R; }
};

// Lane k R + r is x[k].
template <class C, int R>
ANYATTN_INLINE typename Lanes<C>::V repeat_keys(typename Lanes<C>::V x) {
    return shuffle<C, KeyOfLane<R>>(x, x);
}

template <int S>
struct OtherLane {
    static constexpr int of(int i) { return i ^ S; }
};

// Combines the keys of each row. Every lane of a row has its result.
template <class C, int R, class Combine>
ANYATTN_INLINE typename Lanes<C>::V reduce_keys(typename Lanes<C>::V x, const Combine &combine) {
    if constexpr (R == lanes<C>) {
        return x;
    } else {
        return reduce_keys<C, 2 * R>(combine(x, shuffle<C, OtherLane<R>>(x, x)), combine);
    }
}

}  // namespace
}  // namespace anyattn
