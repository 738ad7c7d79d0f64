// Scales of quantised keys and values. The scale of a key multiplies its products, the scale of a value its weights.
#pragma once
#include "load.inl.h"

namespace anyattn {
namespace {

inline bool is_quantised(const anyattn_call &call) { return call.k.dtype >= ANYATTN_INT8; }

// Returns the scales of the keys (or values) of one KV head of one sequence. slots: see KeyRows.
inline KeyRows scale_rows(const anyattn_array &array, const anyattn_call &call, const Sequence &s, int64_t h_kv,
                          const int32_t *slots) {
    KeyRows rows = key_rows(array, call, s, h_kv);
    rows.rows.data += s.index * array.stride[3] * dtype_size(array.dtype);
    rows.slots = slots;
    return rows;
}

// Zeros after the scales of a tile, which vectors reach.
template <class C>
constexpr int64_t kScalesAfter = 2 * lanes<C>;

template <class C>
ANYATTN_NOINLINE void load_scales(C *to, const KeyRows &rows, int64_t j, int64_t n) {
    rows.for_each(j, n, [&](int64_t i, const char *scale) { to[i] = C(load<float>(scale)); });
    for (int64_t i = n; i < n + kScalesAfter<C>; ++i) to[i] = 0;
}

// Multiplies each row of a tile of P lanes by its scale. If `top` is not null, writes the largest value of each lane.
template <class C, int P>
ANYATTN_NOINLINE void scale_tile(C *S, const C *scale, int64_t n, int vectors, typename Lanes<C>::V *top) {
    using V = typename Lanes<C>::V;
    for (int c = 0; c < vectors; ++c) {
        V highest = splat(-infinity(C()));
        C *at = S + c * lanes<C>;
        for (int64_t j = 0; j < n; ++j, at += P) {
            const V scaled = load<V>(at) * splat(scale[j]);
            store(at, scaled);
            highest = larger(highest, scaled);
        }
        if (top) top[c] = highest;
    }
}

}  // namespace
}  // namespace anyattn
