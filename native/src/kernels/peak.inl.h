// Peak rate of multiply-adds of this instruction set: independent sums in registers only. `bench` divides by it.
#pragma once
#include "vector.inl.h"

namespace anyattn {
namespace {

// As many sums as a register tile of the products has: kRows * kPanelVectors.
constexpr int kRows = 6;
constexpr int kSums = kRows * kPanelVectors;

template <class V, class Body>
ANYATTN_INLINE void for_sums(V (&acc)[kRows][kPanelVectors], const Body &body) {
    ANYATTN_UNROLL
    for (int i = 0; i < kRows; ++i) {
        ANYATTN_UNROLL
        for (int c = 0; c < kPanelVectors; ++c) body(acc[i][c]);
    }
}

// Returns the floating-point operations of n rounds. The sums go to `sink`, so that no compiler removes them.
template <class C>
ANYATTN_NOINLINE double peak_rounds(int64_t n, volatile double *sink) {
    using V = typename Lanes<C>::V;
    const V factor = splat(C(*sink)), term = splat(C(*sink));
    V acc[kRows][kPanelVectors], sum{};
    C start = 0;
    for_sums(acc, [&](V &x) { x = splat(start++); });
    for (int64_t round = 0; round < n; ++round) for_sums(acc, [&](V &x) { x = x * factor + term; });
    for_sums(acc, [&](V &x) { sum += x; });
    *sink = double(sum[0]);
    return 2.0 * double(n) * kSums * lanes<C>;
}

}  // namespace
}  // namespace anyattn
