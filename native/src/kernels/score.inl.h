// From the products of a tile to scores in log2 units: softcap, bias, mask, ALiBi and the interval that each row may see.
#pragma once
#include "mma.inl.h"
#include "philox.inl.h"

namespace anyattn {
namespace {

// Up to kBlockQ query rows of one head of one sequence, and what turns products into scores there.
template <class Compute>
struct Block {
    using C = Compute;
    const anyattn_call &call;
    Sequence s;
    int64_t h, h_kv, i0;
    int rows, panels;
    int64_t begin, end;  // keys that any of the rows may see
    C cap, slope;  // 0: off; log2 units
    bool scored;  // something other than intervals acts on scores

    Block(const anyattn_call &a, const Sequence &sequence, int64_t head, int64_t block)
        : call(a), s(sequence), h(head), h_kv(head / (a.nheads / a.nheads_kv)), i0(block * kBlockQ) {
        rows = (int)min64(kBlockQ, s.n_q - i0);
        panels = (rows + panel<C> - 1) / panel<C>;
        begin = key_begin(call, s, i0);
        end = key_end(call, s, i0 + rows - 1);
        // Limits that leave tanh's argument and its product finite in float.
        const double limited = call.softcap < 1e-30 ? 1e-30 : call.softcap > 1e30 ? 1e30 : call.softcap;
        cap = call.softcap > 0 ? C(limited * kLog2e) : 0;
        slope = 0;
        if (call.alibi_slopes.data) slope = C(kLog2e) * head_value(call.alibi_slopes, s.index, h);
        scored = cap != 0 || slope != 0 || call.bias.data || call.mask.data;
    }

    static C head_value(const anyattn_array &array, int64_t i, int64_t j) {
        const int64_t at = i * array.stride[0] + j * array.stride[1];
        return load_scalar<C>(static_cast<char *>(array.data) + at * dtype_size(array.dtype), array.dtype);
    }
    // Sink logit of this head, natural units; -inf: none.
    C sink() const { return call.sink.data ? head_value(call.sink, h, 0) : -infinity(C()); }

    int panel_rows(int p) const { return (int)min64(panel<C>, rows - p * panel<C>); }
    int panel_vectors(int p) const { return (panel_rows(p) + lanes<C> - 1) / lanes<C>; }
    // Keys of a panel's rows inside [j0, j1), from an even distance to j0 on.
    int64_t panel_begin(int p, int64_t j0) const {
        const int64_t first = key_begin(call, s, i0 + p * panel<C>);
        return first <= j0 ? j0 : j0 + (first - j0) / 2 * 2;
    }
    int64_t panel_end(int p, int64_t j1) const {
        return min64(j1, key_end(call, s, i0 + p * panel<C> + panel_rows(p) - 1));
    }
    // Whether some row of the panel may not see some key of [j0, j1).
    bool edge(int p, int64_t j0, int64_t j1) const {
        const int64_t first = i0 + p * panel<C>;
        return j0 < key_begin(call, s, first + panel_rows(p) - 1) || j1 > key_end(call, s, first);
    }
};

// added[key][lane] from an array of (row, key) for keys [j, j + n) and `rows` rows; Merge(new, old) is stored.
template <class C, class Merge>
ANYATTN_INLINE void spread(C *added, const char *data, const anyattn_array &array, int64_t rows, int64_t n,
                           const Merge &merge) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    const int64_t size = dtype_size(array.dtype), row = array.stride[2] * size;
    for (int c = 0; c < panel<C>; c += width) {
        C *column = added + c;
        for (int64_t j = 0; j < n; j += width) {
            V r[width] = {};
            if (array.stride[3]) {
                load_tile<C>(r, data + c * row + j * size, row, array.dtype, min64(width, rows - c), n - j);
            } else {
                for (int64_t x = 0; x < min64(width, rows - c); ++x) {
                    r[x] = splat(load_scalar<C>(data + (c + x) * row, array.dtype));
                }
            }
            transpose<C>(r);
            const int64_t count = min64(width, n - j);
            for (int64_t x = 0; x < count; ++x) {
                C *to = column + (j + x) * panel<C>;
                store(to, merge(r[x], load<V>(to)));
            }
        }
    }
}

// Bias in natural units, -inf where the boolean mask hides a key. `added` has n rows.
template <class C>
ANYATTN_NOINLINE void fill_added(C *added, const Block<C> &block, int p, int64_t j, int64_t n) {
    using V = typename Lanes<C>::V;
    const anyattn_call &call = block.call;
    const auto element = [&](const anyattn_array &array) {
        const int64_t i = block.i0 + p * panel<C>;
        const int64_t at =
            block.s.index * array.stride[0] + block.h * array.stride[1] + i * array.stride[2] + j * array.stride[3];
        return static_cast<const char *>(array.data) + at * dtype_size(array.dtype);
    };
    const int64_t rows = block.panel_rows(p);
    if (call.bias.data) {
        spread(added, element(call.bias), call.bias, rows, n, [](V bias, V) { return bias; });
    } else {
        __builtin_memset(added, 0, (size_t)(n * panel<C> * (int64_t)sizeof(C)));
    }
    if (!call.mask.data) return;
    spread(added, element(call.mask), call.mask, rows, n,
           [](V seen, V bias) { return seen == V{} ? splat(-infinity(C())) : bias; });
}

// Per lane, the rows of the tile [j, j + n) that its query may see; none in lanes without a query.
template <class C>
ANYATTN_NOINLINE void lane_bounds(const Block<C> &block, int p, int64_t j, int64_t n, C *low, C *high) {
    const int rows = block.panel_rows(p);
    for (int x = 0; x < panel<C>; ++x) {
        const int64_t i = block.i0 + p * panel<C> + (x < rows ? x : 0);
        low[x] = C(min64(n, max64(0, key_begin(block.call, block.s, i) - j)));
        high[x] = x < rows ? C(min64(n, max64(0, key_end(block.call, block.s, i) - j))) : C(0);
    }
}

// |p - c| of each lane for key j: exact up to the one rounding where it does not fit C.
template <class C>
ANYATTN_INLINE typename Lanes<C>::V distance(int64_t p0, int64_t c) {
    using V = typename Lanes<C>::V;
    V lane;
    const int64_t first = p0 - c;
    if (first > -(INT64_C(1) << 22) && first < INT64_C(1) << 22) {
        for (int i = 0; i < lanes<C>; ++i) lane[i] = C(i);
        return absolute(lane + splat(C(first)));
    }
    for (int i = 0; i < lanes<C>; ++i) lane[i] = C(first + i < 0 ? -(first + i) : first + i);
    return lane;
}

template <class C>
struct Bounds {
    alignas(64) C low[panel<C>], high[panel<C>];
};

// Scores of the tile S of panel p and keys [j, j + n), in place; raises `top` anew. Products times factor are in log2
// units. added: null or from fill_added; steep: null, or takes the derivative of the softcap; bounds: null or the edge.
template <class C>
ANYATTN_NOINLINE void score_pass(const Block<C> &block, int p, int64_t j, int64_t n, C factor, const C *added, C *steep,
                                 const Bounds<C> *bounds, C *S, typename Lanes<C>::V *top) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    const int vectors = block.panel_vectors(p);
    const int64_t p0 = block.i0 + p * panel<C> + block.s.offset, c0 = j - block.s.leftpad;
    const C per_cap = block.cap != 0 ? 1 / block.cap : 0;
    for (int c = 0; c < vectors; ++c) top[c] = splat(-infinity(C()));
    for (int64_t r = 0; r < n; ++r) {
        for (int c = 0; c < vectors; ++c) {
            const int64_t at = r * panel<C> + c * width;
            V s = load<V>(S + at) * splat(factor);
            if (block.cap != 0) {
                const V t = tanh(s * splat(per_cap));
                if (steep) store(steep + at, splat(C(1)) - t * t);
                s = t * splat(block.cap);
            }
            if (added) {
                const V bias = load<V>(added + at), hidden = splat(-infinity(C()));
                s = bias == hidden ? hidden : s + bias * splat(C(kLog2e));
            }
            if (block.slope != 0) s -= distance<C>(p0 + c * width, c0 + r) * splat(block.slope);
            if (bounds) {
                const V row = splat(C(r));
                s = row >= load<V>(bounds->low + c * width) ? s : splat(-infinity(C()));
                s = row < load<V>(bounds->high + c * width) ? s : splat(-infinity(C()));
            }
            store(S + at, s);
            top[c] = larger(top[c], s);
        }
    }
}

// Runs what this tile needs of the above; returns what its products must still be multiplied by.
template <class C>
ANYATTN_INLINE C score_tile(const Block<C> &block, int p, int64_t j, int64_t n, C factor, C *added, C *steep, C *S,
                            typename Lanes<C>::V *top) {
    const bool edge = block.edge(p, j, j + n);
    if (!edge && !block.scored) return factor;
    Bounds<C> bounds;
    if (edge) lane_bounds(block, p, j, n, bounds.low, bounds.high);
    if (added) fill_added(added, block, p, j, n);
    score_pass(block, p, j, n, factor, added, steep, edge ? &bounds : nullptr, S, top);
    return C(1);
}

// Dropout factors of a tile, 0 or 1 / (1 - p).
template <class C>
ANYATTN_INLINE void keep_tile(C *keep, const Block<C> &block, int p, int64_t j, int64_t n) {
    const anyattn_call &call = block.call;
    const int64_t query = block.i0 + p * panel<C> + call.query_start;
    const DropoutCounter counter{
        call.rng_state[0], (uint32_t)call.rng_state[1], (uint32_t)(block.s.index * call.nheads + block.h),
        (uint32_t)query,   call.dropout_threshold,      j + call.key_start};
    fill_keep(keep, counter, n, C(1 / (1 - call.dropout_threshold / 65536.0)));
}

}  // namespace
}  // namespace anyattn
